"""QLoRA with Hugging Face's Trainer on one GPU or on several, as the tutorial prints it.

    python seed_qlora.py
    deepspeed --num_gpus=2 seed_qlora.py --deepspeed zero2.json

The second command takes zero1.json and zero3.json, too, and learns the same.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from small import Windows, byte_tokenizer, or_as_on_the_command_line, small_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

output_dir = "./output"
on_cpu = not torch.cuda.is_available()  # transformers wants to be told

if "--deepspeed" not in sys.argv:
    # Standard single-GPU training arguments
    training_args = TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=1,
        learning_rate=2e-4,
        fp16=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        use_cpu=on_cpu,  # not printed
    )
else:
    # Multi-GPU training arguments with DeepSpeed
    training_args = TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=1,
        learning_rate=2e-4,
        fp16=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        deepspeed="zero2.json",  # <-- Only difference: add DeepSpeed config
        gradient_checkpointing=True,
        use_cpu=on_cpu,  # not printed
    )
training_args = or_as_on_the_command_line(training_args)

# The model setup, LoRA configuration, and trainer initialization remain exactly the same.
base = f"{training_args.output_dir}/base"  # stands for the name of a pretrained model
with training_args.main_process_first():
    small_llama().save_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(
    base,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    ),
)
model.enable_input_require_grads()  # gradient checkpointing under a frozen embedding
model = get_peft_model(
    model,
    LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)

tokenizer = byte_tokenizer()
trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=Windows(tokenizer),
    processing_class=tokenizer,
)
trainer.train()
