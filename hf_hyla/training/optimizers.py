"""Muon on the matrices inside the layers and AdamW on everything else, as one optimiser."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer
from transformers import Trainer

from ..model.layers_hyla import HylaLayer, HylaRouter
from .arguments import MUON, HylaTrainingArguments
from .graphs import Recorded


class StackedMuon(Muon):
    """
    `torch.optim.Muon` with `adjust_lr_fn="original"` that orthogonalises all matrices of one shape together, since calls
    cost more than multiplications for small matrices. Updates equal torch's up to the rounding of bfloat16, and the state is
    the same.

    Attributes:
        recorded (`Recorded`, *optional*): replays all but the update itself as a CUDA graph.
    """

    recorded: Recorded | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        stacks = [(group, params) for group in self.param_groups for params in _of_one_shape(group["params"])]
        for (group, params), directions in zip(stacks, self._directions(stacks), strict=True):
            rows, columns = params[0].shape
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _directions(self, stacks: list[tuple[dict[str, Any], list[torch.Tensor]]]) -> list[tuple[torch.Tensor, ...]]:
        """The directions of the update, for the parameters of each stack."""
        work = [(group, self._momenta(params), _gradients(params)) for group, params in stacks]
        if self.recorded is None:
            return [self._direction(*stack) for stack in work]
        tensors = [tensor for _, momenta, gradients in work for tensor in (*momenta, *gradients)]
        return self.recorded(lambda: [self._direction(*stack) for stack in work], tensors)

    def _momenta(self, params: list[torch.Tensor]) -> list[torch.Tensor]:
        for p, gradient in zip(params, _gradients(params), strict=True):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(gradient)
        return [self.state[p]["momentum_buffer"] for p in params]

    def _direction(
        self, group: dict[str, Any], momenta: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        return self._orthogonalised(ahead, group).unbind()

    @staticmethod
    def _orthogonalised(matrices: Sequence[torch.Tensor], group: dict[str, Any]) -> torch.Tensor:
        """Five steps of Newton and Schulz: (matrices, rows, columns) whose singular values lie around 1."""
        a, b, c = group["ns_coefficients"]
        x = torch.stack(list(matrices)).bfloat16()
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.mT if tall else x).to(matrices[0].dtype, memory_format=torch.contiguous_format)


def _of_one_shape(params: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The parameters that have a gradient, those of the same shape on the same device together."""
    alike: dict[tuple, list[torch.Tensor]] = {}
    for p in params:
        if p.grad is not None:
            alike.setdefault((p.shape, p.device, p.dtype), []).append(p)
    return list(alike.values())


def _gradients(params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.grad for p in params if p.grad is not None]


class MuonAdamW(Optimizer):
    """
    `torch.optim.Muon` and `torch.optim.AdamW` as one optimiser, with one list of groups for the scheduler and one state to
    save and load. AdamW's groups come first. Each group names its `algorithm`, `"muon"` or `"adamw"`.

    Args:
        muon (`Muon`), adamw (`AdamW`): optimisers of different parameters that have made no step yet.
    """

    def __init__(self, muon: Muon, adamw: AdamW):
        self._parts: dict[str, Optimizer] = {"adamw": adamw, "muon": muon}
        groups = [
            {**group, "algorithm": algorithm} for algorithm, part in self._parts.items() for group in part.param_groups
        ]
        # Schedules of transformers that end at a rate of their own divide it by this one.
        super().__init__(groups, defaults={"lr": adamw.defaults["lr"]})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: if the group does not name its algorithm, or has parameters for Muon that are no matrices.
        """
        part = self._parts.get(param_group.get("algorithm", ""))
        if part is None:
            raise ValueError(
                f"A group of parameters needs the key 'algorithm', which is 'muon' or 'adamw', got "
                f"{param_group.get('algorithm')!r}: add it."
            )
        params = param_group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        shapes = [tuple(p.shape) for p in params if isinstance(p, torch.Tensor) and p.ndim != 2]
        if param_group["algorithm"] == "muon" and shapes:
            raise ValueError(
                f"Muon takes matrices, got a parameter of the shape {shapes[0]}: give it the algorithm 'adamw'."
            )
        super().add_param_group({**part.defaults, **param_group, "params": params})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for algorithm, part in self._parts.items():
            # Set again in every step, since loading a state dict replaces groups and state.
            part.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            part.state = self.state
            part.step()
        return loss


def muon_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    The parameters that Muon takes, by name: the trained weights of the linear maps inside the layers.

    Muon makes the singular values of an update equal, which suits maps from hidden states to hidden states. It does not take

    - embeddings, input projections, heads and routers, since their rows belong to single symbols, answers or experts;
    - biases, norms and tables of positions, which are not linear maps;
    - `value_mixing` and the weights of experts, which are stacks of matrices, and torch's Muon takes only matrices.

    The two matrices of a LoRA adapter are linear maps inside a layer, so Muon takes them. They need a learning rate of
    their own.
    """
    parameters = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, HylaLayer):
            continue
        routers = {part for router in layer.modules() if isinstance(router, HylaRouter) for part in router.modules()}
        for name, module in layer.named_modules(prefix=path):
            if isinstance(module, nn.Linear) and module not in routers and module.weight.requires_grad:
                parameters[f"{name}.weight"] = module.weight
    first_names = {id(p): name for name, p in reversed(parameters.items())}  # of each, if layers share it
    return {name: p for name, p in parameters.items() if first_names[id(p)] == name}


def muon_adamw(model: nn.Module, args: HylaTrainingArguments, decayed: Collection[str]) -> MuonAdamW:
    """
    The optimiser of `optim="muon"`. Muon decays all of its parameters, and AdamW those of its own that `decayed` names.

    Raises:
        ValueError: if the model has no parameter for Muon, or parameters are sharded.
    """
    matrices = muon_parameters(model)
    if not matrices:
        raise ValueError(
            "optim='muon' found no trained matrix inside a HylaLayer of this model: choose another optim, such as "
            "'adamw_torch'."
        )
    taken = set(matrices.values())
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad and p not in taken}
    refuse_shards(any(isinstance(p, DTensor) for p in (*taken, *rest.values())))

    # Found by the name of the projection, which wrappers such as LoRA keep.
    of_qk = {name: bool({"q_proj", "k_proj"} & set(name.split("."))) for name in matrices}
    rate_qk = args.muon_learning_rate if args.muon_learning_rate_qk is None else args.muon_learning_rate_qk
    muon = StackedMuon(
        [
            {"params": [p for name, p in matrices.items() if not of_qk[name]], "lr": args.muon_learning_rate},
            {"params": [p for name, p in matrices.items() if of_qk[name]], "lr": rate_qk},
        ],
        weight_decay=args.weight_decay,
        momentum=0.95,
        adjust_lr_fn="original",
    )
    muon.recorded = Recorded() if args.cuda_graphs else None
    adamw = AdamW(
        [
            {"params": [p for name, p in rest.items() if name in decayed], "weight_decay": args.weight_decay},
            {"params": [p for name, p in rest.items() if name not in decayed], "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    return MuonAdamW(muon, adamw)


def check_optimizer(args: HylaTrainingArguments) -> None:
    """
    Raises:
        ValueError: if torch refuses the settings of the optimiser.
    """
    if args.optim != MUON:
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer([nn.Parameter(torch.zeros(1))], **settings)


def refuse_shards(sharded: bool) -> None:
    """
    Raises:
        ValueError: if parameters are sharded, since Muon needs whole matrices.
    """
    if sharded:
        raise ValueError(
            "optim='muon' needs whole matrices, but FSDP, DeepSpeed or a device mesh shards them: launch with "
            "recipes/accelerate/ddp.yaml, or choose another optim."
        )
