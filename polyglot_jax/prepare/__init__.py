"""From text to what training reads: `prepare` makes token files, `tokenizer` trains a tokenizer on the same inputs.

readers.py, parquet_rows.py and web.py turn one file into rows; corpus.py turns files into counted, NFC-normalised
documents; personal_data.py masks (number_words.py has the words it goes by); folder.py makes the result appear whole or
not at all; command.py, train_tokenizer.py and audit.py are the commands. pipeline.py is what `prepare --clean` does,
with cleaning.py (the steps), duplicates.py (MinHash), engine.py (one process or Ray) and clean_report.py (a page on it
all).
"""
