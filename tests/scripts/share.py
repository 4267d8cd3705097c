"""Two ranks find or share a plan in many situations; rank 0 prints what both came to. The argument is a folder with plans."""

import os
import sys
from pathlib import Path

import torch.distributed as dist

from espresso_ds.core.errors import EspressoError
from espresso_ds.integrations import plan_source
from espresso_ds.integrations.initialize import find_plan

folder = Path(sys.argv[1])
GOOD, OTHER, TORN = ((folder / name).read_text() for name in ("plan.json", "other.json", "torn.json"))
dist.init_process_group("gloo")
rank = dist.get_rank()
os.chdir(folder)
os.mkdir(f"of-rank-{rank}")  # each rank's own disk
os.chdir(f"of-rank-{rank}")
path = Path("plan")


def sent(text):
    """The variables that a launcher would send for this plan."""
    Path("launched").write_text(text)
    plan_source.export_plan("launched", "openmpi")
    return {name: value for name, value in os.environ.items() if name.startswith("ESPRESSO_PLAN_")}


def without_plan(variables):
    return {name: variables[name] for name in ("ESPRESSO_PLAN_HASH",)}


launched, other = sent(GOOD), sent(OTHER)
damaged = {**launched, "ESPRESSO_PLAN_0": launched["ESPRESSO_PLAN_0"][:-80]}
text = launched["ESPRESSO_PLAN_0"]
garbled = {**launched, "ESPRESSO_PLAN_0": text[:100] + text[100:200][::-1] + text[200:]}
replaced = {**launched, "ESPRESSO_PLAN_0": other["ESPRESSO_PLAN_0"]}
# what each of the two ranks has on its disk, and in its environment
CASES = {
    "the file is on one host": [(GOOD, {}), (None, {})],
    "on the other host": [(None, {}), (GOOD, {})],
    "on both": [(GOOD, {}), (GOOD, {})],
    "on none": [(None, {}), (None, {})],
    "on none, and sent without": [(None, without_plan(launched))] * 2,
    "they differ": [(GOOD, {}), (OTHER, {})],
    "one is stale, the launcher tells": [(GOOD, without_plan(launched)), (OTHER, without_plan(launched))],
    "one is torn": [(GOOD, {}), (TORN, {})],
    "damaged on the way": [(None, launched), (None, damaged)],
    "garbled on the way": [(None, launched), (None, garbled)],
    "replaced on the way": [(None, launched), (None, replaced)],
}

for case, of_ranks in CASES.items():
    text, variables = of_ranks[rank]
    for name in [name for name in os.environ if name.startswith("ESPRESSO_")]:
        del os.environ[name]
    os.environ.update({"ESPRESSO_CONFIG": "plan", **variables})
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    try:
        source = find_plan(None, "")
        result = f"rank {rank}: {source.where.partition(' on ')[0]}"
        assert source.ds_config == plan_source.json.loads(GOOD)
        alike = False
    except EspressoError as error:
        result, alike = f"{type(error).__name__}: {error}", True
    results = [None, None]
    dist.all_gather_object(results, result)
    assert not alike or results[0] == results[1], f"{case}: not alike: {results}"
    if rank == 0:
        print(f"case {case}: {results[0] if alike else '; '.join(results)}\n", end="", flush=True)
dist.destroy_process_group()
