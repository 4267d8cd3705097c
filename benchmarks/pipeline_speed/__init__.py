"""Pipelines over slow links: step time and bytes of plans against DeepSpeed's PipelineEngine, and against their predictions.

    python -m benchmarks.pipeline_speed --models text,image --stages 2,4 --rates 100mbit,200mbit
    python -m benchmarks.pipeline_speed report

in an environment with espresso_ds and MPI, on a machine with nothing else to do, as root or with user namespaces. One emulated
host for each stage. Writes a file for each cell (model x stages x rate) into benchmarks/results/pipeline_speed; profiles and
plans stay in .pipeline_speed.
"""
