"""A plain training script, for `espresso trace`: benchmarks/pipeline_speed/train.py --model text --stages 2"""

import argparse

import deepspeed

from benchmarks.pipeline_speed.models import batches, ds_config, module

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--stages", type=int, required=True)
    parser.add_argument("--local_rank")
    args = parser.parse_args()
    deepspeed.init_distributed(dist_backend="gloo")
    engine, *_ = deepspeed.initialize(model=module(args.model, args.stages), config=ds_config(args.model))
    data = batches(args.model)
    for _ in range(100):
        engine.train_batch(data)
