"""trl's own GRPOTrainer, on a small model behind a real server: sampler and trainer agree at every step."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")
from vllm_deterministic.errors import UnsupportedError
from vllm_deterministic.train import LiveServer
from vllm_deterministic.train.trl import rollout, scoring
from vllm_deterministic.verify.server import serve

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.serving, pytest.mark.slow]


def test_sampler_and_trainer_agree(make, save, tmp_path):
    from datasets import Dataset

    model = make("Llama")
    tokenizer = save(model, tmp_path / "model")
    seen = []

    class Watching(trl.GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            scores, entropies, rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self.scores = scores.detach()
            return scores, entropies, rest

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            mask = inputs["completion_mask"].bool()
            seen.append(torch.equal(self.scores[mask], inputs["sampling_per_token_logps"][mask]))
            return loss

    options = ("--dtype", "float32", "--enforce-eager", "--deterministic", "--max-model-len", "256")
    updates = ("--weight-transfer-config", '{"backend": "safetensors"}')
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with serve(tmp_path / "model", *options, *updates, env=environment, log=tmp_path / "log") as server:
        config = trl.GRPOConfig(
            output_dir=str(tmp_path / "out"),
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
        completions = []

        def reward(completion_ids, **kwargs):
            completions.append(completion_ids)
            return [float(sum(token % 2 for token in ids)) for ids in completion_ids]

        live = LiveServer(server.url)
        before = live.description()["fingerprint"]
        trainer = Watching(
            model,
            reward_funcs=reward,
            args=config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": ["w5 w6 w7", "w8 w9"] * 8}),
            rollout_func=rollout(live),
        )
        with scoring(trainer.model):
            trainer.train()
            assert live.description()["fingerprint"] != before
            config.repetition_penalty = 1.1
            with pytest.raises(UnsupportedError):
                rollout(live)(["w5"], trainer)
    assert seen == [True] * 3
    assert all(len({tuple(ids) for ids in group}) == 8 for group in completions)
