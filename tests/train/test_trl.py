"""trl's own GRPOTrainer, on a small model behind a real server: sampler and trainer agree at every step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
import vllm_deterministic
from vllm_deterministic.errors import DeterministicError, UnsupportedError
from vllm_deterministic.train import LiveServer, LocalEngine, deterministic_forward
from vllm_deterministic.train.trl import rollout, scoring
from vllm_deterministic.verify.probes import Probe
from vllm_deterministic.verify.server import serve

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.serving, pytest.mark.slow]


class Watching(trl.GRPOTrainer):
    """Compares the scores it trains on with those of the sampler, at every step."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        scores, entropies, rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.scores = scores.detach()
        return scores, entropies, rest

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"].bool()
        self.seen = [
            *getattr(self, "seen", []),
            torch.equal(self.scores[mask], inputs["sampling_per_token_logps"][mask]),
        ]
        return loss


@pytest.fixture(scope="module")
def served(make, save, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    tokenizer = save(make("Llama"), folder / "model")
    options = ("--dtype", "float32", "--enforce-eager", "--deterministic", "--max-model-len", "256")
    updates = ("--weight-transfer-config", '{"backend": "safetensors"}')
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with serve(folder / "model", *options, *updates, env=environment, log=folder / "log") as server:
        yield LiveServer(server.url), tokenizer, server


def made(model, served, folder, generate):
    """The trainer, and the list that its answers go to: eight to a prompt, a prompt for each step."""
    from datasets import Dataset

    completions = []

    def reward(completion_ids, **kwargs):
        completions.append(completion_ids)
        return [float(sum(token % 2 for token in ids)) for ids in completion_ids]

    config = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=12,
        max_steps=3,
        learning_rate=1e-3,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    data = Dataset.from_dict({"prompt": ["w5 w6 w7", "w8 w9"] * 8})
    trainer = Watching(model, reward, config, train_dataset=data, processing_class=served[1], rollout_func=generate)
    return trainer, completions


@pytest.fixture(scope="module")
def local(make, save, tmp_path_factory):
    """The same model in an engine inside this process."""
    from vllm import LLM

    folder = tmp_path_factory.mktemp("local") / "model"
    tokenizer = save(make("Llama"), folder)
    with deterministic_forward(make("Llama")):
        pass  # a trainer that was here before the engine leaves nothing that the engine would use
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        llm = LLM(
            str(folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            additional_config=vllm_deterministic.enable(),
            weight_transfer_config={"backend": "safetensors"},
        )
        assert llm.collective_rpc(lambda worker: os.getpid()) == [os.getpid()]
        yield LocalEngine(llm), tokenizer
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("where", ["served", "local"])
def test_sampler_and_trainer_agree(make, where, request, tmp_path):
    """At every step, between which the weights change; and a second run is the first."""
    served = request.getfixturevalue(where)
    live = served[0]
    runs = []
    for number in range(2):
        trainer, completions = made(make("Llama"), served, tmp_path / str(number), rollout(live))
        with scoring(trainer.model):
            before = live.send_weights(trainer.model)
            trainer.train()
            assert live.description()["fingerprint"] != before
        assert trainer.seen == [True] * 3
        assert all(len({tuple(ids) for ids in group}) == 8 for group in completions)
        runs.append((completions, [parameter.detach() for parameter in trainer.model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


def test_with_trls_own_scores_they_differ(make, served, tmp_path):
    """The negative control: the same answers, scored as trl does without `scoring`."""
    live, *_ = served
    generate = rollout(live)

    def within(prompts, trainer):
        with deterministic_forward(trainer.model):  # for the update alone
            return generate(prompts, trainer)

    trainer, _ = made(make("Llama"), served, tmp_path, within)
    trainer.train()
    assert False in trainer.seen


def test_a_failed_update_of_a_local_engine_answers_nobody(make, local, tmp_path):
    engine, _ = local
    probe = Probe("any", [5, 6, 7], max_tokens=4, logprobs=0)
    (tmp_path / "none.safetensors").write_bytes(b"")
    with deterministic_forward(make("Llama")) as model:
        name = engine.send_weights(model)
        (before,) = engine.sample([probe])
        with pytest.raises(Exception, match="header"):
            engine._update(tmp_path / "none.safetensors")
        with pytest.raises(DeterministicError, match="half-way"):
            engine.sample([probe])
        assert engine.send_weights(model) == name
        assert engine.sample([probe]) == [before]


def test_what_a_rollout_does_not_pass_on_is_refused(make, served, tmp_path):
    trainer, _ = made(make("Llama"), served, tmp_path, None)
    trainer.args.repetition_penalty = 1.1
    with pytest.raises(UnsupportedError, match="max_completion_length"):
        rollout(served[0])(["w5"], trainer)


def test_the_example(served):
    _, _, server = served
    example = Path(__file__).parents[2] / "examples" / "trl_grpo.py"
    command = [sys.executable, str(example), server.url, server.model, "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].startswith("vd1-")
