"""What an option does to the gradients of all ranks, simulated plainly: whole arrays move at once and no byte is packed.

Every rank is a record of which elements it is in charge of and what it holds of them: values, or packets, each being the elements
it stands for and what they will be decoded as. Written for the tests of the executor, with nothing of it used here.
"""

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Rank:
    elements: np.ndarray  # in charge of these, ascending; those past the end of the tensor are padding
    values: np.ndarray  # by element, sound for `elements`
    packets: list = field(default_factory=list)
    active: bool = True
    unions: list = field(default_factory=list)  # what it was in charge of before each division


def sign(p):
    """EF-SignSGD of at most one block."""
    return np.where(np.signbit(p), -1, 1).astype(np.float32) * np.float32(np.abs(p).mean(dtype=np.float64))


def topk(density):
    """TopK with values in bfloat16; the lowest index wins a tie."""

    def decoded(p):
        kept = np.argsort(-np.abs(p), kind="stable")[: max(1, round(density * len(p)))]
        out = np.zeros_like(p)
        out[kept] = torch.from_numpy(p[kept]).bfloat16().float().numpy()
        return out

    return decoded


def identity(p):
    return p.copy()


class Cluster:
    """The ranks of `nodes` hosts, with the residuals of one tensor from step to step."""

    def __init__(self, nodes, ranks_per_node, text, codec):
        self.world, self.width = nodes * ranks_per_node, ranks_per_node
        self.actions = [word.split(".") for word in text.split()]
        self.codec = codec
        self.residuals = {}
        self.groups = {
            "flat": [range(self.world)],
            "intra": [range(first, first + ranks_per_node) for first in range(0, self.world, ranks_per_node)],
            "inter": [range(local, self.world, ranks_per_node) for local in range(ranks_per_node)],
        }

    def step(self, grads):
        """Every rank's result, shape (ranks, n), for gradients of this shape; roots are the first of their groups."""
        numel = grads.shape[1]
        pad = int(np.prod([len(self.groups[at][0]) for task, at in self.actions if task in ("RS", "A2A")], dtype=int))
        padded = -(-numel // pad) * pad
        ranks = [Rank(np.arange(padded), np.pad(grad, (0, padded - numel))) for grad in grads]
        for number, (task, at) in enumerate(self.actions):
            if task == "C":
                for place, rank in enumerate(ranks):
                    self.compress(place, rank, number, numel)
            elif task == "D":
                for rank in ranks:
                    decompress(rank)
            else:
                for group in self.groups[at]:
                    self.move(task, at, [ranks[place] for place in group], number)
        assert all(rank.active and not rank.packets for rank in ranks)
        return np.stack([rank.values[:numel] for rank in ranks])

    def compress(self, place, rank, number, numel):
        if not rank.active:
            return
        pieces = 1
        for task, at in self.actions[number + 1 :]:
            if task == "D":
                break
            pieces *= len(self.groups[at][0]) if task == "A2A" else 1
        for part, elements in enumerate(np.split(rank.elements, pieces)):
            inside = elements[elements < numel]
            if len(inside):
                p = rank.values[inside] + self.residuals.get((place, number, part), np.float32(0))
                decoded = self.codec(p)
                self.residuals[place, number, part] = p - decoded
                rank.packets.append((inside, decoded))

    def move(self, task, at, group, number):
        root, others = group[0], group[1:]
        second = any(before[0] in ("RS", "A2A", "RD", "GA") and before[1] == at for before in self.actions[:number])
        if task == "BC":
            if root.active:
                for rank in others:
                    rank.values, rank.elements = root.values.copy(), root.elements
                    rank.packets, rank.active = list(root.packets), True
            return
        if not all(rank.active for rank in group):
            return
        packed = bool(group[0].packets) or any(rank.packets for rank in group)
        if task in ("AR", "RD", "RS"):
            assert not packed
            total = sum(rank.values for rank in group)
            for rank in group:
                rank.values = total.copy()
        if task in ("GA", "AG") and packed:
            everything = [packet for rank in group for packet in rank.packets]
            for rank in group:
                rank.packets = list(everything)
        if task == "A2A":
            parts = [set(part.tolist()) for part in np.split(root.elements, len(group))]
            sent = [[[packet for packet in rank.packets if packet[0][0] in part] for part in parts] for rank in group]
            for place, rank in enumerate(group):
                rank.packets = [packet for row in sent for packet in row[place]]
        if task in ("RS", "A2A"):
            for rank, part in zip(group, np.split(root.elements, len(group)), strict=True):
                rank.unions.append(rank.elements)
                rank.elements = part
        if task in ("RD", "GA"):
            for rank in others:
                rank.active, rank.packets = False, []
        if task == "AG" and second:
            if not packed:
                values = root.values.copy()
                for rank in group:
                    values[rank.elements] = rank.values[rank.elements]
                for rank in group:
                    rank.values = values.copy()
            for rank in group:
                rank.elements = rank.unions.pop()


def decompress(rank):
    if not rank.active:
        return
    total = np.zeros_like(rank.values)
    for elements, decoded in rank.packets:
        total[elements] += decoded
    rank.values, rank.packets = total, []
