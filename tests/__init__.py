"""All tests but those of lora2.py's promises, which travel with it in test_lora2.py."""
