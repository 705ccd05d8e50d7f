"""trl's own GRPOTrainer on a card, its sampler in the same process: they agree at every step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
trl = pytest.importorskip("trl")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import vllm_deterministic  # noqa: E402
from vllm_deterministic.train import LocalEngine, deterministic_forward  # noqa: E402
from vllm_deterministic.train.trl import rollout, scoring  # noqa: E402

HERE = Path(__file__).parent
STEPS = 3


class Watching(trl.GRPOTrainer):
    """Compares the scores it trains on with those of the sampler, at every step."""

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        scores, entropies, rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.scores = scores.detach()
        return scores, entropies, rest

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"].bool()
        equal = torch.equal(self.scores[mask], inputs["sampling_per_token_logps"][mask])
        self.seen = [*getattr(self, "seen", []), equal]
        return loss


def fresh(folder: Path) -> Any:
    """The folder's model with the same random weights each time, in the card's memory."""
    torch.manual_seed(5)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.03)
    return model


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalEngine, Path]]:
    from vllm import LLM

    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, HERE / "made_up.py", folder], check=True)
    folder /= "llama"
    fresh(folder).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        llm = LLM(
            str(folder),
            enforce_eager=True,
            max_model_len=512,
            gpu_memory_utilization=0.05,
            kv_cache_memory_bytes=1 << 30,
            additional_config=vllm_deterministic.enable(),
            weight_transfer_config={"backend": "safetensors"},
        )
        assert llm.collective_rpc(lambda worker: os.getpid()) == [os.getpid()]
        yield LocalEngine(llm), folder


def trained(model: Any, folder: Path, out: Path, generate: Callable[..., Any]) -> tuple[Watching, list[Any]]:
    """The trainer, and the list that its answers go to: eight to a prompt, a prompt for each step."""
    from datasets import Dataset

    completions: list[Any] = []

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        completions.append(completion_ids)
        return [float(sum(token % 2 for token in ids)) for ids in completion_ids]

    config = trl.GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=24,
        max_steps=STEPS,
        learning_rate=1e-3,
        bf16=False,
        report_to=[],
        save_strategy="no",
    )
    trainer = Watching(
        model,
        reward,
        config,
        train_dataset=Dataset.from_dict({"prompt": ["once upon", "a time"] * 8}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        rollout_func=generate,
    )
    return trainer, completions


def test_sampler_and_trainer_agree(local: tuple[LocalEngine, Path], tmp_path: Path) -> None:
    """At every step, between which the weights change; and a second run is the first."""
    engine, folder = local
    runs = []
    for number in range(2):
        trainer, completions = trained(fresh(folder), folder, tmp_path / str(number), rollout(engine))
        with scoring(trainer.model):
            before = engine.send_weights(trainer.model)
            trainer.train()
            assert engine.description()["fingerprint"] != before
        assert trainer.seen == [True] * STEPS
        assert all(len({tuple(ids) for ids in group}) == 8 for group in completions)
        runs.append((completions, [parameter.detach() for parameter in trainer.model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


def test_control_with_trls_own_scores_they_differ(local: tuple[LocalEngine, Path], tmp_path: Path) -> None:
    engine, folder = local
    generate = rollout(engine)

    def within(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        with deterministic_forward(trainer.model):  # for the update alone
            return generate(prompts, trainer)

    trainer, _ = trained(fresh(folder), folder, tmp_path, within)
    trainer.train()
    assert False in trainer.seen
