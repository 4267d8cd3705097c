"""What compression between pipeline stages does to quality: the study of "Activations and Gradients Compression for
Model-Parallel Training" (Rudakov et al., 2023) on models that a small machine can train, by DeepSpeed's pipeline engine.

    python -m benchmarks.pipeline_quality --models image,text --seeds 0,1,2
    python -m benchmarks.pipeline_quality report
"""
