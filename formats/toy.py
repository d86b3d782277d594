def tokenizer():
    import data
    return data.demo_tokenizer()
