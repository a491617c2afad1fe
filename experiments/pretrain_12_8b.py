"""Polyglot-Ko 12.8B as it was published: 167B tokens in 301,000 steps of 256 sequences of 2,048.

Command:   python -m experiments.pretrain_12_8b              the plan
           python -m experiments.pretrain_12_8b --estimate   compiled anew for its meshes; records/pretrain_12_8b.json
"""

from experiments.pretraining import Recipe, main

RECIPE = Recipe(
    name="pretrain_12_8b",
    preset="polyglot-ko-12.8b",
    tokens=167e9,
    meshes={"v5p:4x8x8": "--mesh.data 4 --mesh.fsdp 64 --train.remat products"},
)

if __name__ == "__main__":
    main(RECIPE)
