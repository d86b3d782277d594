"""How it is trained: fast twins of lora2.py and model.py, and the methods that LoRA² is compared
with.

fast.py computes what lora2.py and model.py define, in fewer operations; train.py runs it and tests
hold it to them. baselines.py has full fine-tuning, BitFit, LoRA, AdaLoRA and SoRA."""
