"""Polyglot-Ko 3.8B as it was published: 219B tokens in 105,000 steps of 1,024 sequences of 2,048.

Command:   python -m experiments.pretrain_3_8b              the plan
           python -m experiments.pretrain_3_8b --estimate   compiled anew for its meshes; records/pretrain_3_8b.json
"""

from experiments.pretraining import Recipe, main

RECIPE = Recipe(
    name="pretrain_3_8b",
    preset="polyglot-ko-3.8b",
    tokens=219e9,
    meshes={"v5e:16x16": "--mesh.fsdp 256"},
)

if __name__ == "__main__":
    main(RECIPE)
