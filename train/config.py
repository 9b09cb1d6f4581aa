"""Configs of training, and `Experiment`, which describes a whole run in one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from data.config import DataConfig
from data.paths import is_local
from model.config import ModelConfig, MoEConfig
from sharding.config import LOGICAL_AXES, MESH_AXES, MeshConfig, ShardingRules

# The special tokens that an objective needs.
OBJECTIVE_MARKS = {"masked": ("mask",), "fill_in_middle": ("fim_prefix", "fim_suffix", "fim_middle")}


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    learning_rate: float = 3e-4  # peak
    schedule: Literal["cosine", "linear", "wsd", "exponential", "inverse_sqrt", "constant"] = "cosine"
    warmup_steps: int = 100  # linear, from 0
    final_fraction: float = 0.1  # of the peak, at the last step, in [0, 1]
    decay_fraction: float = 0.2  # wsd: share of the steps after the warm-up in which the rate falls, in [0, 1]
    betas: tuple[float, ...] = (0.9, 0.95)  # decay rates of the averages of the gradient and its square, in [0, 1)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["matrices", "all"] = "matrices"  # "matrices" excludes norms, biases and sinks
    clip_norm: float | None = 1.0  # largest global norm of the gradient; none: no clipping

    def validate(self) -> None:
        """Raise ValueError that names the field, its value and a fix."""
        for name, low, high in (
            ("final_fraction", 0, 1), ("decay_fraction", 0, 1),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"optimizer.{name} = {getattr(self, name)}: must be between {low} and {high}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas = {self.betas}: must be two decay rates in [0, 1), as in (0.9, 0.95)")
        if not self.epsilon > 0:
            raise ValueError(f"optimizer.epsilon = {self.epsilon}: must be above 0")
        if not self.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate = {self.learning_rate}: must be above 0")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"optimizer.warmup_steps = {self.warmup_steps} and optimizer.weight_decay = {self.weight_decay}: "
                "neither may be below 0"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optimizer.clip_norm = {self.clip_norm}: must be above 0, or none for no clipping")


@dataclass(frozen=True)
class RewindConfig:
    """When a run returns to an earlier checkpoint because its loss diverged (train/rewind.py)."""

    rise: float = 0.5  # nats above the median of the `window` losses before, from which a loss counts as diverged
    patience: int = 5  # steps in a row with such a loss, or with one that is not finite, before the run rewinds
    window: int = 100  # steps; nothing is detected before as many
    margin: int = 100  # steps by which the restored checkpoint must be older than the first such loss
    limit: int = 3  # rewinds of a run, after which the next divergence ends it

    @property
    def keep_older(self) -> int:
        """Steps by which a checkpoint must be older than the newest one, so that a run can return to it at any time."""
        return self.margin + self.patience

    def validate(self) -> None:
        """Raise ValueError that names the field, its value and a fix."""
        if not 0 < self.rise < math.inf:
            raise ValueError(f"train.rewind.rise = {self.rise}: must be a number of nats above 0, such as 0.5")
        for name, least in (("patience", 1), ("window", 1), ("margin", 0), ("limit", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"train.rewind.{name} = {getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    seed: int = 0  # of the initial weights, dropout and objectives
    trainable_layers: int | None = None  # number of last layers to train with the final norm and head; none: everything
    objective: Literal["next_token", "masked", "fill_in_middle", "prefix", "distillation"] = "next_token"
    teacher: str = ""  # distillation: path of the run whose predictions are matched
    distillation_temperature: float = 2.0  # of both softmaxes (Hinton et al. 2015, sec. 2)
    distillation_mix: float = 0.5  # weight of the teacher's predictions in [0, 1]; the targets have the rest
    mask_rate: float = 0.15  # masked: share of tokens that are predicted (Devlin et al. 2019)
    fim_rate: float = 0.5  # fill_in_middle: share of rows that are rearranged (Bavarian et al. 2022)
    fim_spm_rate: float = 0.5  # share of these rows in suffix-prefix-middle instead of prefix-suffix-middle order
    z_loss: float = 0.0  # coefficient of mean logsumexp(logits)^2 (Chowdhery et al. 2022)
    # Ids whose logits a device holds at once; none: all of up to 32,768, otherwise 8,192 at a time.
    loss_chunk: int | None = None
    microbatches: int = 1  # slices of the batch whose gradients are summed before an update
    ema_decay: float | None = None  # of the averaged weights for evaluation and sampling, in [0, 1); none: no average
    nonfinite: Literal["stop", "skip"] = "stop"  # at a NaN or infinite loss or gradient; neither updates the weights
    rewind: RewindConfig | None = None  # return to an earlier checkpoint when the loss diverges; none: never
    eval_every: int = 250  # steps; 0: only at the end
    eval_windows: int = 128  # windows of each held-out set, evenly spaced; the final evaluation uses all
    eval_stride: int | None = None  # tokens scored per window, after the rest as context; none: all, without context
    checkpoint_every: int = 250  # steps; there is always a checkpoint at the end
    # Steps between further checkpoints in local_checkpoint_dir, on the disk of each host; 0: none (train/tiers.py).
    local_checkpoint_every: int = 0
    local_checkpoint_dir: str = ""
    keep_last: int = 2  # newest checkpoints to keep
    keep_best: int = 1  # further checkpoints to keep, by bits per byte of the first held-out set
    log_every: int = 10  # steps between rows of metrics.jsonl
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    check_devices: bool = True  # compare the devices of several processes, at the start and at every checkpoint
    watchdog_seconds: float = 0.0  # without a step before the process prints its stacks and exits; 0: off

    def validate(self) -> None:
        """Raise ValueError that names the field, its value and a fix."""
        for name in ("steps", "microbatches", "eval_windows", "checkpoint_every", "keep_last", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("seed", "eval_every", "keep_best", "watchdog_seconds", "z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} = {getattr(self, name)}: must be 0 or more")
        if bool(self.local_checkpoint_dir) != (self.local_checkpoint_every > 0):
            raise ValueError(
                f"train.local_checkpoint_every = {self.local_checkpoint_every} and train.local_checkpoint_dir = "
                f"{self.local_checkpoint_dir!r}: local checkpoints need both, a number of steps above 0 and a folder. "
                f"Try train.local_checkpoint_dir=/tmp/checkpoints, or set neither"
            )
        if not is_local(self.local_checkpoint_dir):
            raise ValueError(
                f"train.local_checkpoint_dir = {self.local_checkpoint_dir!r}: must be on the disk of each host. Try "
                f"/tmp/checkpoints"
            )
        if self.steps >= 2**31:
            raise ValueError(f"train.steps = {self.steps}: steps are counted in 32 bits; use at most 2**31 - 1")
        if self.seed >= 2**32:
            raise ValueError(f"train.seed = {self.seed}: set it between 0 and 2**32 - 1")
        if not 0 < self.distillation_temperature < math.inf:
            raise ValueError(
                f"train.distillation_temperature = {self.distillation_temperature}: must be above 0; 2 is common"
            )
        if (self.objective == "distillation") != bool(self.teacher):
            raise ValueError(
                f"train.objective = {self.objective!r} and train.teacher = {self.teacher!r}: the objective "
                "'distillation' needs the run of a teacher, and no other objective takes one; set both, or neither"
            )
        for name in ("mask_rate", "fim_rate", "fim_spm_rate", "distillation_mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.{name} = {getattr(self, name)}: must be a probability between 0 and 1")
        if self.loss_chunk is not None and self.loss_chunk < 1:
            raise ValueError(
                f"train.loss_chunk = {self.loss_chunk}: must be at least 1 id of the vocabulary (thousands are best), "
                f"or none for the default"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay = {self.ema_decay}: must be at least 0 and below 1, or none")
        if self.rewind is not None:
            self.rewind.validate()


@dataclass(frozen=True)
class SampleConfig:
    """Completions of held-out files at the end of a run."""

    count: int = 3
    prompt_tokens: int = 96  # tokens of the file that each completion continues
    new_tokens: int = 96  # tokens generated per completion
    temperature: float = 0.7
    top_p: float = 0.95


@dataclass(frozen=True)
class Experiment:
    """The complete description of a run. An ablation is a `dataclasses.replace` of another experiment."""

    name: str
    question: str = ""  # question that the run answers
    source: str = ""  # paper or other origin
    cost: str = ""  # measured cost, with the machine
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingRules = ShardingRules()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    samples: SampleConfig = SampleConfig()

    def validate(self, device_count: int, *, training: bool = True) -> None:
        """Check every part, and the parts against each other and the devices, before any compilation or download.

        Without `training`, skip the checks that only matter for training, so that a finished run can be sampled
        whatever its schedule was. Raises ValueError with one paragraph that names the field, its value and a fix.
        """
        for part in (self.model, self.sharding, self.data, self.optimizer, self.train):
            part.validate()
        if self.data.sequence_length > self.model.max_length:
            raise ValueError(
                f"data.sequence_length = {self.data.sequence_length}: longer than model.max_length = "
                f"{self.model.max_length}; raise the latter or shorten the windows"
            )
        if self.model.moe is not None:
            self.model.moe.validate_length(self.data.sequence_length)
        layers = self.train.trainable_layers
        if layers is not None and not 1 <= layers <= self.model.num_layers:
            raise ValueError(
                f"train.trainable_layers = {layers}: must be between 1 and model.num_layers = {self.model.num_layers}, "
                "or none to train everything"
            )
        if training and self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps}: longer than the run, train.steps = "
                f"{self.train.steps}, so that the learning rate never reaches its peak; set it to {self.train.steps} "
                f"or less, or train.steps higher"
            )
        self._validate_samples()
        self._validate_objective()
        stride = self.train.eval_stride
        if stride is not None and not 1 <= stride <= self.data.sequence_length:
            raise ValueError(
                f"train.eval_stride = {stride}: must be between 1 and data.sequence_length = "
                f"{self.data.sequence_length} tokens per window, or none to score all"
            )
        self._validate_mesh(dict(zip(MESH_AXES, self.mesh.sizes(device_count), strict=True)))

    def _validate_samples(self) -> None:
        s = self.samples
        if s.count < 0 or s.prompt_tokens < 2 or s.new_tokens < 1:
            raise ValueError(
                f"samples: count = {s.count} must be 0 or more, prompt_tokens = {s.prompt_tokens} at least 2, "
                f"and new_tokens = {s.new_tokens} at least 1"
            )
        if not s.temperature >= 0 or not 0 < s.top_p <= 1:
            raise ValueError(
                f"samples: temperature = {s.temperature} must be 0 or more, and top_p = {s.top_p} must be in (0, 1]"
            )
        if s.count and s.prompt_tokens + s.new_tokens > self.model.max_length:
            raise ValueError(
                f"samples.prompt_tokens = {s.prompt_tokens} + samples.new_tokens = {s.new_tokens}: longer than "
                f"model.max_length = {self.model.max_length}; shorten them, or set samples.count=0"
            )

    def _validate_objective(self) -> None:
        objective, mask = self.train.objective, self.model.attention.mask
        marks = OBJECTIVE_MARKS.get(objective, ())
        if marks and self.data.tokenizer.kind == "saved":
            from data.tokenizer import special_tokens

            special = special_tokens(self.data.tokenizer)
            lacking = [name for name in marks if getattr(special, name) < 0]
            if lacking:
                raise ValueError(
                    f"train.objective = {objective!r}: the tokenizer in data.tokenizer.path = "
                    f"{self.data.tokenizer.path!r} lacks the "
                    f"special tokens that it needs ({', '.join(lacking)}); choose another objective or tokenizer"
                )
        if objective == "masked" and mask != "bidirectional":
            raise ValueError(
                f"train.objective = 'masked': this objective predicts from both sides, but model.attention.mask = "
                f"{mask!r}; set the mask to bidirectional"
            )
        if (objective == "prefix") != (mask == "prefix"):
            raise ValueError(
                f"train.objective = {objective!r} and model.attention.mask = {mask!r}: the objective 'prefix' draws "
                "the prefix that the mask 'prefix' makes visible to every token; set both, or neither"
            )
        if objective != "masked" and mask == "bidirectional":
            raise ValueError(
                f"train.objective = {objective!r}: with model.attention.mask = 'bidirectional' every token sees its "
                "own target; set the mask to causal, or the objective to masked"
            )

    def _validate_mesh(self, mesh: dict[str, int]) -> None:
        from model.attention import attention_variant

        def devices(side: str, axis: str) -> int:
            product = 1
            for name in getattr(getattr(self.sharding, side), axis):
                product *= mesh[name]
            return product

        used = {axis for name in LOGICAL_AXES for axis in getattr(self.sharding.activations, name)}
        for axis, size in mesh.items():
            if size > 1 and axis not in used:
                raise ValueError(
                    f"mesh.{axis} = {size}: no field of sharding.activations names this axis, so its devices would "
                    "repeat each other's work; set it to 1"
                )
        model, moe = self.model, self.model.moe
        sizes = [
            ("model.embed_dim", "embed", model.embed_dim),
            ("data.sequence_length", "sequence", self.data.sequence_length),
        ]
        for kind in dict.fromkeys(model.attention.layers):
            sizes += attention_variant(model.attention, kind).divisibility(model)
        if moe is None or "dense" in moe.layers:
            sizes.append(("model.mlp.hidden_dim", "mlp", model.mlp.hidden_dim))
        if moe is not None:
            sizes += [
                ("model.moe.num_experts", "expert", moe.num_experts),
                ("model.moe.hidden_dim", "mlp", moe.hidden_dim),
            ]
            if moe.router == "soft":  # expert slots are sharded like tokens
                sizes.append(("model.moe.num_experts * model.moe.top_k", "sequence", moe.num_experts * moe.top_k))
        if model.vocab_size:
            sizes.append(("model.vocab_size", "vocab", model.vocab_size))
        for field, axis, size in sizes:
            for side in ("weights", "activations"):
                if size % devices(side, axis):
                    raise ValueError(
                        f"{field} = {size}: does not divide over the {devices(side, axis)} devices of mesh axes "
                        f"{getattr(getattr(self.sharding, side), axis)} (sharding.{side}.{axis}); change one of them"
                    )
        if moe is not None:
            self._validate_expert_mesh(moe, mesh)
        rows = devices("activations", "batch") * self.train.microbatches
        if self.data.batch_size % rows:
            raise ValueError(
                f"data.batch_size = {self.data.batch_size}: does not divide into train.microbatches = "
                f"{self.train.microbatches} slices for {devices('activations', 'batch')} devices; make it a multiple "
                f"of {rows}"
            )

    def _validate_expert_mesh(self, moe: MoEConfig, mesh: dict[str, int]) -> None:
        """Check that the experts divide over the mesh axes of both weights and activations, as in their shard_map."""
        for field, axis, size in (("num_experts", "expert", moe.num_experts), ("hidden_dim", "mlp", moe.hidden_dim)):
            both = {name for side in ("weights", "activations") for name in getattr(getattr(self.sharding, side), axis)}
            count = math.prod(mesh[name] for name in both)
            if size % count:
                raise ValueError(
                    f"model.moe.{field} = {size}: does not divide over the {count} devices of the mesh axes that "
                    f"sharding.weights.{axis} and sharding.activations.{axis} name together; change one of them"
                )
