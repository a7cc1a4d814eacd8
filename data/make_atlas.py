"""Make the bundled atlas anew: short studies of all five recipes on the pocket models, in data/atlas.

    python data/make_atlas.py FOLDER      # where the studies are kept; a finished one is not made again

The settings are short, so that everything is made in minutes on two cores; the masks are examples of what the
recipes give, not results. Run it with OMP_NUM_THREADS=1: sums of floats depend on how they are split.
"""
from __future__ import annotations

import shutil
import sys
from pathlib import Path

from subnet_explorer.cli import main
from subnet_explorer.core.atlas import masks_of_studies, save_atlas, study_tables

ATLAS = Path(__file__).resolve().parent / "atlas"
STUDIES = {
    "lamp": "--model pocket-bert --facts pocket --relations IsA,PartOf,MadeOf,UsedFor,Desires,Causes --seeds 0,1 "
            "--steps 150 --batch 16 --random 2",
    "critical": "--model pocket-gpt2 --target pocket --about bird --control pocket --text pocket "
                "--seeds 0,1 --random 1",
    "probe": "--model pocket-bert --task pos --train pocket --dev pocket --limit-train 60 --limit-dev 60 "
             "--granularity neuron,head --seeds 0,1 --steps 150 --lr 0.1 --baselines mlp",
    "tamt": "--model pocket-bert --text pocket --densities 0.3 --methods omp,mlm --steps 150 --no-embeddings "
            "--seeds 0,1",
    "tickets": "--model pocket-bert --tasks pocket:entails pocket:similar --seeds 0,1 --no-supers --epochs 4 "
               "--lr 1e-3",
}
SIZE = 30_000
"Bytes of the largest table that is bundled."


def made(folder: Path) -> None:
    "Make what is missing, and the atlas."
    for name, words in STUDIES.items():
        place = ["--device", "cpu", "--no-report", "--quiet", "--out", str(folder / name)]
        if status := main([name, *words.split(), *place]): raise SystemExit(status)
    tables = {name: table for name, table in study_tables(folder).items() if len(table.to_csv()) < SIZE}
    shutil.rmtree(ATLAS, ignore_errors=True)
    save_atlas(masks_of_studies(folder), ATLAS, title="Subnetworks of the pocket models", licence="apache-2.0",
               tables=tables)


if __name__ == "__main__": made(Path(sys.argv[1]))
