"""Fast twins of lora2.py and model.py, and the methods that LoRA² is compared with.

fast_lora2.py and fast.py compute what lora2.py and model.py define, in fewer operations; train.py
runs them and tests hold them to it. baselines.py has LoRA, AdaLoRA and SoRA; by_name.py chooses.
"""
