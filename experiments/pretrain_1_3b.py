"""Polyglot-Ko 1.3B as it was published: 213B tokens in 102,000 steps of 1,024 sequences of 2,048.

Command:   python -m experiments.pretrain_1_3b              the plan
           python -m experiments.pretrain_1_3b --estimate   compiled anew for its meshes; records/pretrain_1_3b.json
"""

from experiments.pretraining import Recipe, main

RECIPE = Recipe(
    name="pretrain_1_3b",
    preset="polyglot-ko-1.3b",
    tokens=213e9,
    meshes={"v5e:8x16": "--mesh.data 2 --mesh.fsdp 64"},
)

if __name__ == "__main__":
    main(RECIPE)
