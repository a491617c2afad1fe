"""From text to what training reads: `prepare` makes token files, `tokenizer` trains a tokenizer on the same inputs.

readers.py turns one file into rows; corpus.py turns files into counted, NFC-normalised documents; folder.py makes the
result appear whole or not at all; command.py and train_tokenizer.py are the two commands.
"""
