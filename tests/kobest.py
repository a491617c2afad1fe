"""KoBEST in small, written as its own files are: line ends, columns, labels and spaces around cells included."""

from pathlib import Path

ROWS = {
    "BoolQ": (
        ["ID", "Text", "Question", "Answer"],
        [
            ["1", "고양이는 마당에서 논다. ", "고양이는 방에 있나요?", "False"],
            ["2", '"봄"이 오면 꽃이 핀다.', "봄에 꽃이 피나요? ", "TRUE"],
            ["3", "겨울에는 눈이 내린다.", "겨울에 눈이 오나요?", "True"],
            ["4", "할머니는 김치를 담갔다.", "할머니는 밥을 지었나요?", "FALSE"],
        ],
    ),
    "COPA": (
        ["ID", "sentence", "question", "1", "2", "Answer"],
        [
            ["1", "눈이 내렸다.", "결과", "길이 미끄럽다.", "꽃이 피었다.", "1"],
            ["2", "아이가 울었다.", "원인 ", " 넘어졌다.", "밥을 먹었다.", "2"],
            ["3", "문을 닫았다.", "원인", "추웠다.", "더웠다.", "1"],
        ],
    ),
    "WiC": (
        ["ID", "Target", "SENTENCE1", "Dictionary 1", "Link 1", "SENTENCE2", "Dictionary 2", "Link2", "ANSWER"],
        [
            ["1", "눈", "[눈]이 내린다.", "1", "x", "[눈]을 감았다.", "2", "y", "FALSE"],
            ["2", "밤", "[밤]에 잔다.", "1", "x", " [밤]이 깊었다.", "1", "y", "True"],
            ["3", "배", "[배]를 먹는다.", "1", "x", "[배]를 탄다.", "2", "y", "False"],
        ],
    ),
    "HellaSwag": (
        ["context", "choice1", "choice2", "choice3", "choice4", "label"],
        [
            ["아이가 문을 연다.", "밖으로 나간다.", "노래한다.", "잠든다.", "운다.", "0"],
            ["할머니가 김치를 담근다.", "노래를 부른다.", "맛을 본다.", "달린다.", "문을 연다.", "1"],
            ["눈이 내린다.", "꽃이 핀다.", "덥다.", "아이들이 눈사람을 만든다.", "배를 탄다.", "2"],
        ],
    ),
    "SentiNeg": (
        ["ID", "Label", "Text"],
        [["1", "0", "정말 싫어요"], ["2", "1", " 아주 좋아요"], ["3", "1", "또 살게요"]],
    ),
}


def write(folder: Path, tests: int = 3) -> Path:
    """All five tasks; train and test hold the same rows, test the first `tests`."""
    for task, (header, rows) in ROWS.items():
        for split, kept in (("train", rows), ("test", rows[:tests])):
            columns = header
            if task == "SentiNeg" and split == "test":
                columns = ["ID", "Label_origin", "Text_origin", "Label", "Text", "Category_neg"]
                kept = [[row[0], "7", "원래 글", row[1], row[2], "3"] for row in kept]
            elif task == "SentiNeg":
                columns, kept = ["ID", "Text", "Label"], [[row[0], row[2], row[1]] for row in kept]
            end = "\n" if task == "HellaSwag" else "\r\n"
            lines = ["\t".join(_quoted(cell) for cell in row) for row in (columns, *kept)]
            file = folder / task / f"{split}.tsv"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((end.join(lines) + end).encode())
    return folder


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if '"' in cell else cell
