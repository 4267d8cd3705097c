"""Model traces of transformers too large to trace here, worked out from their published shapes.

Tensor parallelism of `tensor_parallel` GPUs, all of one node, and data parallelism between nodes. A data-parallel rank holds and
synchronises its part of every matrix, 1 / tensor_parallel of it, and all of every norm's weights; sizes are exact. Its group
has one rank of every node, and the `tensor_parallel` groups of a node use the node's card at once.

Ready times follow from FLOPs alone. Forward costs 2 per weight and token; scores and values of causal attention cost 2 more per
token, head dimension and half the sequence, each; backward costs twice its forward, the output first. All at one achieved rate,
which stands for everything that a GPU does in forward and backward: activations are kept and not recomputed, and traffic of
tensor parallelism counts as compute. Left out: the optimizer step, pipeline parallelism, ZeRO, expert layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from espresso_ds.core.profile import ModelTrace


@dataclass(frozen=True)
class Transformer:
    """A decoder with gated feed-forward layers, RMS norms, no biases, and input and output embeddings of their own."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def head(self) -> int:
        """Elements of one head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """All weights of the model."""
        return sum(rows * columns for _, (rows, columns), _ in self.backward())

    def backward(self) -> Iterator[tuple[str, tuple[int, int], int]]:
        """Weights in the order in which backward completes their gradients: name, shape, and attended width.

        A norm's shape is (1, hidden). The attended width is heads times head for the value projection, whose gradient is the
        first that has to wait for the backward of attention's scores and values, and 0 for all else.
        """
        keys = self.key_value_heads * self.head
        yield "lm_head.weight", (self.vocabulary, self.hidden), 0
        yield "model.norm.weight", (1, self.hidden), 0
        for layer in reversed(range(self.layers)):
            at = f"model.layers.{layer}"
            yield f"{at}.mlp.down_proj.weight", (self.hidden, self.intermediate), 0
            yield f"{at}.mlp.up_proj.weight", (self.intermediate, self.hidden), 0
            yield f"{at}.mlp.gate_proj.weight", (self.intermediate, self.hidden), 0
            yield f"{at}.post_attention_layernorm.weight", (1, self.hidden), 0
            yield f"{at}.self_attn.o_proj.weight", (self.hidden, self.hidden), 0
            yield f"{at}.self_attn.v_proj.weight", (keys, self.hidden), self.hidden
            yield f"{at}.self_attn.k_proj.weight", (keys, self.hidden), 0
            yield f"{at}.self_attn.q_proj.weight", (self.hidden, self.hidden), 0
            yield f"{at}.input_layernorm.weight", (1, self.hidden), 0
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden), 0


@dataclass(frozen=True)
class Training:
    """How it is trained: what one data-parallel replica handles per step, on how many GPUs, how fast."""

    sequences: int
    sequence: int
    """Tokens of each."""
    tensor_parallel: int
    flops_per_s: float
    """Achieved by one GPU."""

    @property
    def tokens(self) -> int:
        """Tokens of one replica and step."""
        return self.sequences * self.sequence


LLAMA_2_70B = Transformer("Llama-2-70B", 80, 8192, 28672, 64, 8, 32000)
"""The shape that its authors published (Touvron et al., 2023, and the model's configuration file)."""
TRAINING = Training(sequences=4, sequence=4096, tensor_parallel=8, flops_per_s=400e12)
"""400 TFLOP/s are some 40% of what an H100 is rated at in bfloat16."""


def trace_of(model: Transformer, training: Training, nodes: int) -> ModelTrace:
    """The trace of one data-parallel rank of `nodes`, gradients in bfloat16. Raises ValueError at a shape that cannot be cut."""
    ways = training.tensor_parallel
    if odd := [n for n in (model.heads, model.key_value_heads, model.intermediate, model.vocabulary) if n % ways]:
        raise ValueError(f"{model.name}: {odd[0]} is not {ways} equal parts; choose another tensor_parallel")
    now_s, tensors = 0.0, []
    for name, (rows, columns), attended in model.backward():
        now_s += 2 * forward_flops(name, rows, columns, attended, training) / (ways * training.flops_per_s)
        shape = (columns,) if rows == 1 else (rows // ways, columns) if _by_rows(name) else (rows, columns // ways)
        numel = columns if rows == 1 else rows * columns // ways
        tensors.append({"name": name, "shape": shape, "dtype": "bfloat16", "numel": numel, "ready_s": now_s})
    return ModelTrace.read(
        {
            "model": model.name,
            "device": "cuda",
            "world_size": nodes,
            "ranks_per_node": 1,
            "threads": 1,
            "cores": 48,
            "steps": 1,
            "config": {},
            "wire_dtype": "bfloat16",
            "forward_s": now_s / 2,
            "backward_s": now_s,
            "after_s": 0.0,
            "tensors": tensors,
        },
        model.name,
    )


def forward_flops(name: str, rows: int, columns: int, attended: int, training: Training) -> float:
    """Of one weight and what is counted with it, over all GPUs of a replica. Norms and looking up embeddings are free."""
    weight = 0 if rows == 1 or "embed" in name else 2 * rows * columns
    return training.tokens * (weight + 2 * attended * training.sequence)


def _by_rows(name: str) -> bool:
    """Whether tensor parallelism cuts the outputs of a layer; the second of two layers in a row is cut by its inputs."""
    return not name.endswith(("down_proj.weight", "o_proj.weight"))
