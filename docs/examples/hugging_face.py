"""`Merger` in a callback of Hugging Face's Trainer."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from merge_callback import Merger


class Merging(TrainerCallback):
    def __init__(self, merger: Merger) -> None:
        self.merger = merger

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **others: Any) -> None:
        self.merger.step(model, optimizer)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, *, model: Any, metrics: Any, eval_dataloader: Any, **others: Any
    ) -> None:
        if not self.merger.is_ready:
            return
        with self.merger.merged_weights(model):
            merged = validate(model, eval_dataloader)
        found = self.merger.observe({"eval_loss": metrics["eval_loss"]}, {"eval_loss": merged})
        state.log_history.append({"step": state.global_step, **found})
        print(state.global_step, {name: round(value, 4) for name, value in found.items()})


@torch.no_grad()
def validate(model: Any, batches: Any) -> float:
    model.eval()
    losses = [float(model(**batch).loss) for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def text(index: int) -> dict[str, Tensor]:
    tokens = torch.randint(4, (24,), generator=torch.Generator().manual_seed(index)).cumsum(0) % 16
    return {"input_ids": tokens, "labels": tokens}


torch.manual_seed(1)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
)
arguments = TrainingArguments(
    output_dir="hugging_face",
    max_steps=200,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=8,
    learning_rate=1e-2,
    # The default, "linear", is never constant: `Merger(start="any")` merges then, and means less.
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=10,
    eval_strategy="steps",
    eval_steps=50,
    report_to=[],
    save_strategy="no",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=[text(index) for index in range(256)],
    eval_dataset=[text(index) for index in range(1000, 1064)],
    callbacks=[merging := Merging(Merger())],
)
trainer.train()
merged = merging.merger.merged_state_dict(model)
model.load_state_dict(merged)
model.save_pretrained("hugging_face/merged")
