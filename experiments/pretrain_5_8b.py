"""Polyglot-Ko 5.8B as it was published: 172B tokens in 320,000 steps of 256 sequences of 2,048.

Command:   python -m experiments.pretrain_5_8b              the plan
           python -m experiments.pretrain_5_8b --estimate   compiled anew for its meshes; records/pretrain_5_8b.json
"""

from experiments.pretraining import Recipe, main

RECIPE = Recipe(
    name="pretrain_5_8b",
    preset="polyglot-ko-5.8b",
    tokens=172e9,
    meshes={"v5e:16x16": "--mesh.fsdp 256"},
)

if __name__ == "__main__":
    main(RECIPE)
