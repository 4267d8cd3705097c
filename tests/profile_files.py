"""A small model's profiles in files, as `espresso prepare` would lay them, and `espresso plan` on them."""

import json

from planner_cases import cluster_of, codecs_of, nested_cluster_of, trace_of

from espresso_ds.cli import main
from espresso_ds.core.plan import load_plan_file

NAMES = ("head.weight", "h.1.norm.weight", "h.1.fc.weight", "h.0.norm.weight", "h.0.fc.weight", "embed.weight")
SIZES = (2**20, 2**10, 2**19, 2**10, 2**19, 2**20)
CONFIG = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 0}}
FILES = {"trace": "--trace", "cluster": "--cluster", "compressors": "--compressors"}


def named_trace(**shape):
    trace = trace_of([(n, 0.02 * (i + 1)) for i, n in enumerate(SIZES)], forward_s=0.05, backward_s=0.13, after_s=0.01, **shape)
    tensors = [t.model_copy(update={"name": name}) for t, name in zip(trace.tensors, NAMES, strict=True)]
    return trace.model_copy(update={"tensors": tuple(tensors)})


def save(folder, trace, cluster, codecs):
    """The three files where `espresso prepare` would put them, and ds.json."""
    beside = folder / "plan.profiles"
    beside.mkdir(parents=True)
    for kind, profile in zip(FILES, (trace, cluster, codecs), strict=True):
        profile.save(beside / f"{kind}.json")
    (folder / "ds.json").write_text(json.dumps(CONFIG))
    return folder


def slow_case(tmp_path):
    """Two hosts behind a slow link."""
    codecs = codecs_of(encode=2e-9, decode=1e-9, share=0.02, contention=0.5)
    return save(tmp_path / "slow", named_trace(), cluster_of(alpha_s=1e-3, bytes_per_s=25e6), codecs)


def nested_case(tmp_path):
    """Two hosts of two ranks, whose links inside are 5,000 times as fast as the one between them."""
    cluster = nested_cluster_of(nodes=2, node=2, alpha_s=(1e-5, 1e-3), bytes_per_s=(25e9, 5e6))
    codecs = codecs_of(encode=2e-9, decode=1e-9, share=0.02)
    return save(tmp_path / "nested", named_trace(world=4, node=2), cluster, codecs)


def plan_words(folder, *more):
    files = [str(word) for kind, flag in FILES.items() for word in (flag, folder / "plan.profiles" / f"{kind}.json")]
    return ["plan", "--ds-config", str(folder / "ds.json"), *files, "-o", str(folder / "plan.json"), *map(str, more)]


def planned(folder, *more):
    main(plan_words(folder, *more))
    return load_plan_file(folder / "plan.json")[2]
