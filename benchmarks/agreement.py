"""How far our samplers are from those of diffusers, on the same betas and networks: the largest relative difference of each.

Prints one JSON line and writes benchmarks/agreement.md. Run: python benchmarks/agreement.py
"""

import itertools
import json
import sys
from pathlib import Path

import diffusers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "diffusion")]

import test_against_diffusers as oracle  # noqa: E402

HEAD = f"""\
# Agreement with diffusers {diffusers.__version__}

Largest difference of x over four schedules, three predictions, x0 clipped and not, T = {oracle.T}, divided by the largest
value of x where that is above 1. Single steps at t = T - 1, T / 2, 1, 0; whole chains of T steps (DPM-Solver++: of 20; its
steps are no functions of t, and it keeps x in float32). "Our tables": its scheduler was given our float64 alpha_bar, which
leaves the formulas; "its tables": it made its own in float32 from our betas, with v-prediction and clipping. DDIM is
compared with `use_clipped_model_output`: without it, eps is kept from before the clipping, on purpose not so here. Written
by `python benchmarks/agreement.py`.

| sampler | one step, our tables | chain, our tables | chain, its tables |
|---|---|---|---|
"""


def main() -> None:
    cases = list(itertools.product(oracle.SCHEDULES, oracle.PREDICTIONS, (True, False)))
    found = {}
    for pair in oracle.PAIRS:
        solver = pair.startswith("DPM")
        steps = 20 if solver else oracle.T
        ts = (oracle.T - 1, oracle.T // 2, 1, 0)
        found[pair] = {
            "step": None if solver else max(oracle.step_difference(pair, *case, t) for case in cases for t in ts),
            "chain": max(oracle.chain_difference(pair, *case, steps) for case in cases),
            "float32": max(oracle.chain_difference(pair, name, "v", True, steps, float64=False) for name in oracle.SCHEDULES),
        }
    rows = [
        f"| {pair} | " + " | ".join("-" if x is None else f"{x:.0e}" for x in row.values()) + " |" for pair, row in found.items()
    ]
    (ROOT / "benchmarks" / "agreement.md").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    print(json.dumps({"diffusers": diffusers.__version__, **found}))


if __name__ == "__main__":
    main()
