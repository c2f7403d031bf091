"""Hugging Face's Trainer on DeepSpeed's configuration, as the tutorial prints it.

    deepspeed --num_gpus=2 seed_trainer.py \
      --deepspeed ds_config.json \
      --per_device_train_batch_size 2 \
      --gradient_accumulation_steps 4

`python seed_trainer.py` is a world of one rank.
"""

from __future__ import annotations

import torch
from small import Windows, byte_tokenizer, or_as_on_the_command_line, small_llama
from transformers import Trainer, TrainingArguments

tokenizer = byte_tokenizer()
train_dataset = Windows(tokenizer)

training_args = TrainingArguments(
    output_dir="./output",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    num_train_epochs=3,
    bf16=True,
    deepspeed="ds_config.json",
    gradient_checkpointing=True,
    logging_steps=10,
    save_strategy="steps",
    save_steps=500,
    use_cpu=not torch.cuda.is_available(),  # not printed: transformers asks for it where bf16 is on
)
training_args = or_as_on_the_command_line(training_args)

model = small_llama()

trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=train_dataset,
    processing_class=tokenizer,  # printed as tokenizer=tokenizer, its name until transformers 5
)

trainer.train()
