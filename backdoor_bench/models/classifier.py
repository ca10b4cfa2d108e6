"""The one shape every network has, and what methods do with it: swap the head, split it, gate its channels.

Shape letters: B batch, C classes, D features, K channels, H and W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from backdoor_bench.errors import ConfigError
from backdoor_bench.types import Facts

NORMALISE = ("dataset", "none")


class Normalise(nn.Module):
    """Images minus ``mean`` over ``std``, per colour channel; both are buffers [1, 3, 1, 1], saved with the model."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class GlobalAveragePool(nn.Module):
    """[B, K, H, W] -> [B, K]. A plain mean, because the adaptive pooling kernel is not deterministic on CUDA."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


@dataclass(frozen=True)
class ConvChannel:
    """A convolution, the batch norm that reads its output and nothing else does, and who reads those channels next.

    All are dotted module names of the classifier. consumers: the convolutions and linear layers reached from the norm
    through activations, pooling, additions and concatenations, that is, before any other convolution.
    """

    conv: str
    norm: str
    consumers: tuple[str, ...]


class Classifier(nn.Module):
    """Float images [B, 3, H, W] in [0, 1] -> logits [B, C]: normalise, blocks in a row, pool to [B, D], linear head.

    stages: stage name ("layer1", "layer2", ...) -> the last block of that stage, in the order of the blocks.
    """

    head: nn.Linear

    def __init__(
        self, normalise: nn.Module, blocks: nn.Sequential, pool: nn.Module, head: nn.Linear, stages: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.blocks = blocks
        self.pool = pool
        self.head = head
        self.stages = dict(stages)

    @property
    def feature_dim(self) -> int:
        return self.head.in_features

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    @property
    def block_names(self) -> tuple[str, ...]:
        """Where ``split`` can cut, from input to output."""
        return tuple(name for name, _ in self.blocks.named_children())

    @property
    def norm_names(self) -> tuple[str, ...]:
        """Dotted names of all batch norms: where ``gated_logits`` can put a gate."""
        return tuple(name for name, module in self.named_modules() if isinstance(module, nn.BatchNorm2d))

    @cached_property
    def channels(self) -> tuple[ConvChannel, ...]:
        """Every convolution whose output goes to one batch norm and nowhere else, in order of computation.

        Read off the traced computation, not the order of the modules. Pre-activation networks have convolutions whose
        output goes into a sum or a concatenation: no norm belongs to them, and they are not listed.
        """
        return _trace_channels(self)

    def features(self, images: Tensor) -> Tensor:
        """[B, D], what the head reads. images: float [B, 3, H, W] in [0, 1]."""
        return self.pool(self.blocks(self.normalise(images)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def logits_and_stages(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(logits [B, C], {stage name: output [B, K, H, W] of its last block}) in one pass; maps are not detached."""
        stage_of = {block: stage for stage, block in self.stages.items()}
        outputs: dict[str, Tensor] = {}
        maps = self.normalise(images)
        for name, block in self.blocks.named_children():
            maps = block(maps)
            if name in stage_of:
                outputs[stage_of[name]] = maps
        return self.head(self.pool(maps)), outputs

    def stage_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """{stage name: output [B, K, H, W] of its last block}, first stage first."""
        return self.logits_and_stages(images)[1]

    def split(self, block: str) -> tuple[nn.Module, nn.Module]:
        """(stem, rest) with ``rest(stem(images)) == self(images)``; the stem ends with, and contains, ``block``.

        Both hold this model's own modules, not copies: training or freezing them acts on this model. Raises ConfigError
        where there is no such block.
        """
        names = self.block_names
        if block not in names:
            raise ConfigError(f"the model has no block {block!r} to be split at: choose one of {', '.join(names)}")
        cut = names.index(block) + 1
        parts = list(self.blocks.children())
        return nn.Sequential(self.normalise, *parts[:cut]), nn.Sequential(*parts[cut:], self.pool, self.head)


class ModelSpec(Protocol):
    """What a model YAML becomes: a frozen dataclass of hyper-parameters."""

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the network cannot take images of this size."""
        ...

    def build(self, num_classes: int, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Classifier:
        """An untrained network on the CPU, initialised from the global generator (the caller seeds it).

        mean, std: of the data set, in [0, 1] pixels, one value a colour channel; not used with ``normalise: none``.
        """
        ...


def assemble(
    blocks: Mapping[str, nn.Module],
    stages: Mapping[str, str],
    feature_dim: int,
    num_classes: int,
    normalise: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Classifier:
    """A Classifier from its blocks, with global average pooling and an ``nn.Linear`` head of default initialisation."""
    chain = nn.Sequential()
    for name, block in blocks.items():
        chain.add_module(name, block)
    first = Normalise(mean, std) if normalise == "dataset" else nn.Identity()
    return Classifier(first, chain, GlobalAveragePool(), nn.Linear(feature_dim, num_classes), stages)


def check_min_size(facts: Facts, minimum: int, key: str, advice: str) -> None:
    """Raise ConfigError if the images are smaller than ``minimum`` pixels; ``key`` is the setting that needs them."""
    if facts.image_size < minimum:
        raise ConfigError(
            f"{key} needs images of at least {minimum} px, but dataset.image_size={facts.image_size}; {advice}"
        )


def replace_head(model: Classifier, num_classes: int, generator: torch.Generator) -> Classifier:
    """A deep copy of ``model`` with a new head for ``num_classes``, drawn as ``nn.Linear`` draws: U(-1, 1) / sqrt(D).

    generator: on the CPU, the only source of randomness, so the head is the same whatever the device.
    """
    new = copy.deepcopy(model)
    old = model.head
    head = nn.utils.skip_init(nn.Linear, old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)
    bound = old.in_features**-0.5
    with torch.no_grad():
        for parameter in (head.weight, head.bias):
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    new.head = head.train(old.training)
    return new


def gated_logits(
    model: Classifier, images: Tensor, gates: Mapping[str, Tensor], shifts: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Logits [B, C] of ``model`` with the weights of batch norms times ``gates`` and their biases times ``shifts``.

    gates, shifts: name in ``model.norm_names`` -> float [K]; norms left out stay as they are. Gate 0 turns a channel
    into the constant ``bias * shift``; with shift 0 too the norm puts out zeros. The result can be differentiated with
    respect to gates, shifts and images. The model is untouched: its parameters get no gradient, and in train mode its
    running statistics stay what they were (the batch's own are used to normalise). Both factors are those of ANP (Wu
    and Wang, NeurIPS 2021). Raises KeyError for an unknown norm, ValueError for a wrong number of channels.
    """
    norms = set(model.norm_names)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # A batch norm in train mode writes into its buffers: it is given copies.
    tensors |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    for scales, part in ((gates, "weight"), (shifts or {}, "bias")):
        for norm, scale in scales.items():
            name = f"{norm}.{part}"
            if norm not in norms:
                raise KeyError(f"no batch norm {norm!r} in this model")
            if scale.shape != tensors[name].shape:
                raise ValueError(
                    f"{norm} has {len(tensors[name])} channels, but its gate has shape {tuple(scale.shape)}"
                )
            tensors[name] = tensors[name] * scale
    return torch.func.functional_call(model, tensors, (images,))


def count_parameters(module: nn.Module) -> int:
    """Number of scalars in all parameters of ``module``, frozen or not; buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def _trace_channels(model: Classifier) -> tuple[ConvChannel, ...]:
    graph = fx.Tracer().trace(model)

    def module_of(node: fx.Node) -> nn.Module | None:
        return model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def readers(node: fx.Node) -> tuple[str, ...]:
        found: dict[str, None] = {}
        seen: set[fx.Node] = set()
        waiting = list(node.users)
        while waiting:
            user = waiting.pop(0)
            if user in seen:
                continue
            seen.add(user)
            if isinstance(module_of(user), nn.Conv2d | nn.Linear):
                found[str(user.target)] = None
            else:
                waiting.extend(user.users)
        return tuple(found)

    channels = []
    for node in graph.nodes:
        if isinstance(module_of(node), nn.Conv2d) and len(node.users) == 1:
            (norm,) = node.users
            if isinstance(module_of(norm), nn.BatchNorm2d):
                channels.append(ConvChannel(str(node.target), str(norm.target), readers(norm)))
    return tuple(channels)
