"How long many relation masks take to be asked: python benchmarks/relations.py; ranks need SUBNET_EXPLORER_DATA."
from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # before torch: threads that wait take no core

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from subnet_explorer import Facts, Space, load, masked, read_facts
from subnet_explorer.core.mask import Mask
from subnet_explorer.data.pocket_tasks import choose
from subnet_explorer.measure.links import link_ranks, rankable
from subnet_explorer.measure.options import OptionReader
from subnet_explorer.recipes.answer import PAPER_RELATIONS
from subnet_explorer.recipes.unions import Asker, Joiner, all_combinations


def seconds(act: Callable[[], Any]) -> float:
    "Time of one call."
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def relation_masks(model: Any, layers: str) -> dict[str, Mask]:
    "A random mask of half the weights for each of sixteen relations."
    space = Space.of(model, "weight", layers=layers)
    return {r: Mask.random(space, .5, seed=i) for i, r in enumerate(PAPER_RELATIONS)}


@torch.no_grad()
def plain_ranks(model: Any, tok: Any, facts: Facts, masks: dict[str, Mask]) -> list[int]:
    "Ranks by the model's own forward pass: padded batches of 32, logits at every position, one mask after another."
    found = []
    prompts = [f.prompt.replace("[MASK]", tok.mask_token) for f in facts]
    gold = [tok(f.object, add_special_tokens=False).input_ids[0] for f in facts]
    for mask in masks.values():
        with masked(model, mask):
            for i in range(0, len(prompts), 32):
                inputs = tok(prompts[i:i + 32], padding=True, return_tensors="pt")
                logits = model(**inputs).logits[inputs.input_ids == tok.mask_token_id]
                right = logits.gather(1, torch.tensor(gold[i:i + 32])[:, None])
                found += (1 + (logits > right).sum(1)).tolist()
    return found


def ranks(n: int) -> str:
    "Objects of ConceptNet ranked in a whole vocabulary under sixteen masks, beside the plain way."
    data = Path(os.environ["SUBNET_EXPLORER_DATA"])
    model, tok = load(data / "models" / "minilm-l6-mlm")
    graph = read_facts(data / "datasets" / "conceptnet100k" / "train.tsv.gz", templates="lamp-b1")
    facts = rankable(Facts(tuple(f for f in graph if f.relation in PAPER_RELATIONS)[:4 * n], "some"), model, tok)
    facts, masks = Facts(facts.items[:n], "some"), relation_masks(model, "4-6")
    tables: list[Any] = []
    ours = seconds(lambda: tables.append(link_ranks(model, tok, facts, masks, known=graph)))
    plain = seconds(lambda: tables.append(plain_ranks(model, tok, facts, masks)))
    by_mask = tables[0].set_index(["under", "uuid"])["rank"]
    asked = [by_mask[name, f.uuid] for name in masks for f in facts]
    apart = [abs(a - b) for a, b in zip(asked, tables[1], strict=True) if a != b]
    return (f"{len(facts):,} objects over {len(tok):,} words under {len(masks)} masks: {ours:.1f} s with ranks among "
            f"candidates and filtered ones; plain {plain:.1f} s, {plain / ours:.1f} times as long; {len(apart)} of "
            f"{len(asked):,} ranks differ, by at most {max(apart, default=0):.0f}")


def combinations(questions: int, score: str, n: int) -> str:
    "Combinations of three of sixteen masks on questions about the pocket world."
    model, tok = load("pocket-bert")
    masks = relation_masks(model, "3-4")
    every = list(all_combinations(list(masks), [3]))[:n]
    asked = choose(questions, part="test")
    shared = Asker(model, OptionReader(model, tok, asked, score, 2), {0: Joiner(masks)})
    alone = OptionReader(model, tok, asked, score)

    def plainly(some: Sequence[Sequence[str]]) -> None:
        for a, b, c in some: Asker(model, alone, {0: Joiner(masks)}).under(masks[a] | masks[b] | masks[c])

    ours = seconds(lambda: [shared.accuracy(*some) for some in every])
    part = every[:max(1, n // 20)]
    plain = seconds(lambda: plainly(part)) * n / len(part)
    return (f"{n} combinations on {questions} questions by {score}: {ours:.0f} s; every block anew and masks joined "
            f"one by one {plain:.0f} s (from {len(part)} of them), {plain / ours:.2f} times as long")


def main() -> None:
    "Measure and print what it takes."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of it")
    part = 20 if parser.parse_args().quick else 1
    print(f"{torch.get_num_threads()} threads")
    if os.environ.get("SUBNET_EXPLORER_DATA"): print(ranks(1200 // part))
    print(combinations(500, "pll", 560 // part))
    print(combinations(500, "logprob", 56 // part))


if __name__ == "__main__": main()
