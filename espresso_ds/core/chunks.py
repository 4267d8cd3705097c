"""Large compressed units travel in chunks: one is compressed while another is on the wire and a third is decompressed."""

from __future__ import annotations


def chunk_lengths(numel: int, chunk_numel: int | None, world_size: int) -> list[int]:
    """Cut `numel` elements into equal chunks of about `chunk_numel`; planner and runtime must cut alike.

    Args:
        numel: elements of the unit.
        chunk_numel: the plan's chunk size, or None for one chunk.
        world_size: every chunk but the last is a multiple of it, so that chunks have whole shards.
    """
    if chunk_numel is None or numel <= chunk_numel:
        return [numel]
    count = -(-numel // chunk_numel)
    length = -(-numel // (count * world_size)) * world_size
    return [min(length, numel - start) for start in range(0, numel, length)]
