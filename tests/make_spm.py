"""Trains tests/data/spm_small.model with SentencePiece and writes SentencePiece's ids of HARD beside it.

    python tests/make_spm.py        (needs sentencepiece; made with 0.2.3)

test_spm.py compares spm.py with these ids, so that it has an oracle where sentencepiece is not installed, and
takes train(), TEXT and HARD from here. The built-in charsmaps are large (240 kB), so this model has RULES.
"""
import io
import json
import os
import tempfile
from pathlib import Path
from random import Random

DATA = Path(__file__).parent / "data"

# {text: replacement}, the small model's charsmap: some of nmt_nfkc's rules, some that need the longest match
RULES = {
    "\t": " ", "\n": " ", "\r": " ", "\u00a0": " ", "\u3000": " ", "\u200b": " ", "\u0001": "", "\u007f": "",
    "\ufb01": "fi", "\ufb03": "ffi", "\u00bd": "1\u20442", "\u2026": "...", "\u2122": "TM",
    "\u00a8": " \u0308", "\uff21": "A", "\uff41": "a", "\uff11": "1", "\u212b": "\u00c5", "\U0001d400": "A",
    "e\u0301": "\u00e9", "a\u0302": "\u00e2", "a\u0302\u0301": "\u1ea5", "\u00e2\u0301": "\u1ea5",
    "\u0301\u0308": "\u0344", "\u0344": "\u0308\u0301", "\U0001f1e9\U0001f1ea": "de", "colour": "color",
    "\u304b\u3099": "\u304c", "\u1112\u1161": "\ud558", "\u1112\u1161\u11ab": "\ud55c",
    "\ud558\u11ab": "\ud55c",
}
SYMBOLS = ["<ent>", "\uff21\uff29", "lo ra", "wxyz", "e\u0301t"]  # user-defined pieces; two begin like a rule

PROSE = """
A language model reads numbers, not letters, and a tokenizer is the part that turns a text into these numbers.
The unigram model gives every piece a score, the logarithm of its probability, and looks for the best sum.
If a word is rare it falls into smaller pieces; if a word is common it is a single piece of the vocabulary.
Low-rank adaptation leaves the pretrained weights as they are and learns a small update beside each of them.
The singular values of the update tell how important each direction is, and the smallest ones are set to zero.
She said that the trial would begin in March 1998, but the company denied it and its shares fell 4.5 percent.
"We are not aware of any new evidence," the spokesman told reporters on Friday, "and we have nothing to add."
A man is playing a guitar on the street while two children watch him and a dog is running through the grass.
The more you read, the less you understand. Who did John say that Mary believes the teacher has already met?
Caf\u00e9, na\u00efve, \u00fcber, fa\u00e7ade and jalape\u00f1o have accents; 12,000 and 3.14 are numbers.
"""
SYLLABLES = "an ber con de ed er ing ion ist ka la ly men na ness out per re ro sta tion un ver wa".split()
random = Random(0)
WORDS = ["".join(random.choices(SYLLABLES, k=random.choice([1, 2, 2, 3, 4]))) for _ in range(400)]
TEXT = PROSE.strip().split("\n") * 3 + [  # the further behind in WORDS, the rarer
    " ".join(random.choices(WORDS, [1 / (n + 3) for n in range(len(WORDS))], k=12)) + random.choice(".!?")
    for _ in range(800)]

# Each of these, alone and in some surroundings, makes HARD.
MARKS = [
    *"\0\x01\x07\t\n\v\f\r\x1b\x7f\x80\x85\x9f\xa0\xad",  # controls and spaces of Latin-1
    *"\u1680\u180e\u2002\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000\u2581",  # spaces; its own
    *"\u200b\u200c\u200d\u200e\u200f\u202a\u202e\u2060\u2066\ufeff",  # invisible: joiners, directions
    *"\ufffc\ufffd\ufffe\uffff\U0010ffff\ue000\ufdd0",  # replacement, private use, not characters
    *"\u0300\u0301\u0302\u0308\u0323\u0327\u0338\u0344\u0345\u05b0\u064b\u0e33\u20dd\u20e3\u3099\ufe0f",
    *"\ufb01\ufb03\ufb05\u0132\u01c4\u0149\u00bd\u00b2\u00aa\u00a8\u2026\u2122\u2460\u2163\u212b\u2126\u00b5",
    *"\uff21\uff41\uff11\uff01\uffe5\uff76\uff9e\u3231\u32ff\u33a5\u337f\ufdfa\U0001d400\U0001d7d8\U0002f800",
    *"\u00e9\u00c9\u00df\u1e9e\u0130\u0131\u01c5\u03c2\u1fb3\u1ffc\u0587\u0414\u05d0\u0627\u0e01\u4e2d\uac00",
    "e\u0301", "e\u0323\u0302", "a\u0302\u0301", "a\u0301\u0302", "\u00e2\u0301", "\u1ec7", "q\u0307\u0323",
    "A\u030a", "\u1112\u1161", "\u1112\u1161\u11ab", "\ud558\u11ab", "\u304b\u3099", "\u30cf\u309a",
    "\u0344\u0301", "\u0301\u0308", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd",
    "1\ufe0f\u20e3", "\u263a\ufe0f", "\U0001f600", "\U0001f1e9\U0001f1ea", "\U0001f1e9\U0001f1ea\U0001f1eb",
    "\r\n", "  ", " \u2581 ", "\u2581\u2581", "\t \t", " \xa0 ", "[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]",
    "[CLS", "CLS]", "<unk>", "<s>", "</s>", "<pad>", "[", "]", " [CLS]", "\u4e2d\u6587\u5206\u8bcd",
    "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627", "\u0928\u092e\u0938\u094d\u0924\u0947",
    *SYMBOLS, "colour", "colou", "wxyzwxy", "a" * 50, "9" * 7, "...", "--", "''", "\\n", "%", "<>", "x" * 300,
]
AROUND = ["*", "**", "a*", "*b", "the*cat", "the * cat", " *", "* ", "caf*\u0301 *", "man *"]
HARD = ["", " ", "  ", "Hello, world!", *TEXT[:10], *(
    around.replace("*", mark) for mark in MARKS for around in AROUND)]


def train(text, rules=None, **options):
    """SentencePiece's trainer with DeBERTaV3's special pieces; text: strings -> bytes of the .model

    rules: {text: replacement}, or None for those of the library, of the name nmt_nfkc if none is given.
    """
    import sentencepiece

    def code_points(text):
        return " ".join(f"{ord(char):X}" for char in text)

    model, before = io.BytesIO(), os.getcwd()
    usual = {"normalization_rule_name": "nmt_nfkc"} if rules is None else {"normalization_rule_tsv": "rules.tsv"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the model notes the name of the rules' file: it shall hold no folder
        try:
            lines = [f"{code_points(key)}\t{code_points(new)}\n" for key, new in (rules or {}).items()]
            Path("rules.tsv").write_text("".join(lines), encoding="ascii")
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **usual | {
                "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]",
                "eos_piece": "[SEP]", "unk_piece": "[UNK]", "hard_vocab_limit": False, "num_threads": 1,
                "minloglevel": 2} | options)
        finally:
            os.chdir(before)
    return model.getvalue()


if __name__ == "__main__":
    import sentencepiece

    DATA.mkdir(exist_ok=True)
    (DATA / "spm_small.model").write_bytes(train(TEXT, RULES, vocab_size=400, user_defined_symbols=SYMBOLS))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "spm_small.model"))
    golden = {"sentencepiece": sentencepiece.__version__, "ids": processor.encode(HARD)}
    (DATA / "spm_small.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n", encoding="ascii")
    print(len(HARD), "texts,", processor.get_piece_size(), "pieces")
