r"""How people write answers. Math-Verify alone reads `12 345` as 357, and nothing in `\boxed{7.}`."""

import json
import time
from pathlib import Path

import pytest

import data
import rewards
from grader import MathVerifier, grade, math_reward
from grader.as_meant import as_meant, boxed_as_meant

GRADING = Path(__file__).parents[2] / "shared/data/math_grading"


def boxed(answer):
    return rf"The final answer is $\boxed{{{answer}}}$. I hope it is correct."


# (gold, answers that are right, answers that are wrong), a kind each. Every gold and right answer is also
# tried the other way round.
KINDS = {
    "thousands": (
        "54321",
        ["54 321", r"54\,321", r"54\ 321", "54~321", r"54\;321", "54\u00a0321", "54\u202f321", "54{,}321"],
        ["375", "321", "54", "54,322", r"54\,322", "5 4 3 2 1"],
    ),
    "millions": (
        "2 000 000",
        [r"2\,000\,000", "2{,}000{,}000", "2,000,000", "2e6"],
        ["0", "2", "2 000", "6"],
    ),
    "decimals": ("1 250.5", ["1250.5", r"1\,250{,}5", "1 250,5", "1250{,}5"], ["12505", "1250", "1 255"]),
    "spaces that are no number": ("4 7", ["4, 7", r"4\ 7"], ["47", "11", "28", "7"]),
    "mixed numbers": (
        "4 1/3",
        [r"\frac{13}{3}", "13/3", r"4\frac13", r"4\,\frac{1}{3}", r"4\ 1/3", "4⅓", r"4\text{ }\frac 1 3"],
        ["5/3", "4/3", "41/3", "5", r"3\frac13", "4½"],
    ),
    "negative mixed numbers": ("-2.25", ["-2 1/4", r"-2\tfrac{1}{4}", "−2¼"], ["2 1/4", "-1.75", "-2 3/4"]),
    "marks": (
        "19",
        ["19.", "19,", "19;", r"19\\", r"19\ ", "**19**", "`19`", "$19$", "= 19"],
        ["19!", "91."],
    ),
    "looks": (
        "12",
        [r"\boldsymbol{12}", r"\underline{\textbf{12}}", r"\mathsf{12}", r"\bf 12", r"\Large{12}", r"{{12}}"]
        + [r"\textcolor{red}{12}", r"\boxed{12}", r"\fbox{12}", r"\displaystyle 12", r"\left(12\right)"]
        + [r"\begin{aligned}12\end{aligned}", r"\text{12}", r"\!12\;", r"\approx 12", r"\sim12"],
        [r"\boldsymbol{13}", r"\mathbf{1}2\mathbf{3}", r"\approx 21"],
    ),
    "looks of a pair": (
        "(2,5)",
        [r"\mathbf{(2,5)}", r"{(2,5)}", r"\langle 2,5\rangle", "（2，5）"],
        ["(5,2)"],
    ),
    "characters": ("-8", ["−8", "–8", "－８", "-٨"], ["８", "−9"]),
    "fractions": (r"\frac{3}{4}", ["¾", "3⁄4", r"\frac34"], ["¼", "34", "4/3"]),
    "powers": ("y^{12}", ["y¹²", "y^12"], ["y^1 2", "y²", "12y"]),
    "roots": (r"3\sqrt{5}", ["3√5", "3√(5)", r"3\sqrt5", r"3\sqrt(5)"], ["3√2", "15", "3"]),
    "infinity": (r"(-\infty, 4\pi]", ["(-∞, 4π]"], ["(-∞, 4π)", "(∞, 4π]"]),
    "relations": (r"t \le 2 \times 3", ["t ≤ 2×3", "t ≤ 6"], ["t ≥ 6", "t < 6"]),
    "degrees": (
        "75",
        ["75°", r"75^\circ", r"75\degree", r"75^{\circ}\mathrm{C}", "75 degrees"],
        ["57°", "75x"],
    ),
    "money": ("30", [r"\$30", "€30", "30 euros", "USD 30", "30 dollars", r"30\text{ USD}"], ["€31", "30k"]),
    "percent": (
        "0.45",
        [r"45\%", "45 percent", r"45\text{ percent}", r"45 \text{ \%}"],
        ["45", "54%", "4.5%"],
    ),
    "units": (
        "15",
        [
            "15 km/h",
            r"15\text{ km/h}",
            r"15~\mathrm{km} / \mathrm{h}",
            "15 cm²",
            "15 m/s^2",
            r"\text{15 days}",
        ]
        + [
            "15 pencils",
            "15th",
            r"15^{\text{th}}",
            "15 people per day",
            "15 个",
            "15 sq. ft.",
            "15 (roughly)",
        ]
        + ["15 (in metres)", r"\text{Answer: }15", "The answer is 15.", r"15\text{ hours a week}"],
        [
            "51 km/h",
            "15 and 3",
            r"15 \text{ pears and 3 figs}",
            "15 or 16 days",
            "at least 15",
            "15q",
            "15 xyz",
        ]
        + [r"\text{not } 15", "3 hours 5 minutes", "1 hour 5 minutes"],
    ),
    "two units": (
        "3 hours 20 minutes",
        [r"3\text{ hours }20\text{ minutes}"],
        ["3", "320", "23", "20", "60"],
    ),
    "names": (
        "42",
        ["n = 42", "x_1=42", "AB = 42", "a+b = 42", r"\text{x = 42}", "42 = n"],
        ["n=24"],
    ),
    "equations": (
        "42",
        [r"\angle A = 42", "f(3) = 42", r"C_7^2 \cdot 2 = 42", "6 · 7 = 42"],
        ["n^2 = 42", "2n = 42", "n - 1 = 42", r"\sqrt{n} = 42", "42 = n^2", r"\frac{n}{2}=42", "-n = 42"],
    ),
    "powers of ten": (
        "6.02e23",
        [r"6.02 \times 10^{23}", "6.02 x 10^23", "6.02*10^{23}", "6.02E+23", r"6.02 10^{23}"],
        [r"6.02 \times 10^{22}", "6.02", "6.02e32"],
    ),
    "small numbers": ("1e-07", ["10^{-7}", "10^-7", "10⁻⁷", r"\frac{1}{10^7}"], ["10^{-6}", "1e-06", "0"]),
    "Euler's number": ("3e-2", ["3e - 2", "-2+3e"], ["0.03", "3e"]),
    "periods": (r"\frac{1}{6}", [r"0.1\overline{6}", r"0.1\dot{6}"], [r"0.\overline{16}", "0.16"]),
    "products": ("6xyz", ["6 x y z", "6 xyz", "6zyx"], ["6", "6xy"]),
    "matrices": (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        [r"\begin{bmatrix}1&2\\3&4\end{bmatrix}."],
        [r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}", "1,2,3,4"],
    ),
    "variables before a bracket": ("rs(r+s)", ["rs(s + r)", "sr(r+s)"], ["r+s", "r(r+s)"]),
    "variables before a sign": ("rs+1", ["1+rs", "sr + 1"], ["1", "r+1"]),
    "currencies": (
        "500",
        ["Rs 500", "Rs. 500", "Rs500", "USD 500", "EUR500", "500 Rs"],
        ["Rs(500)", "rs 500", "usd 500", "500Rs"],
    ),
    "number words": (
        "3000000",
        ["3 million", r"3\text{ Million}", r"\text{3 million}", r"3\text{ million dollars}", r"\$3 million"]
        + [
            "3,000 thousand",
            "30 hundred thousand",
            r"\frac{6}{2} million",
            "x = 3.0 million",
            "300万",
            "0.03亿",
        ]
        + ["2 million 1000 thousand", "0.003 billion", "250 thousand dozen people"],
        ["3", "3 billion", "3 thousand", r"3\text{ trillion}", "3万", "2 million 1000", "5 million"],
    ),
    "words that change a number": (
        "5",
        ["5 hours", r"5\text{ apples}", "5千克"],
        ["5 squared", "5 cubed", "5 factorial", "5 tenths", "5 hundredths", "5 half", "5万", "5亿", "5个半"]
        + [r"5\text{ squared}", r"5\text{ tenths}", r"\text{5 factorial}", "5 hundred", "5 dozen"],
    ),
    "letters of units": (
        "3",
        ["3 m/s", "3 m/s^2", "3 J/K", r"3\text{ m}", r"3\text{ p.m.}", "3 km/h"],
        ["3 x/y", "3 m/n", r"3\mathrm{e}", r"3\mathrm{i}", r"3\text{k}"],
    ),
    "quotients": ("3 x/y", [r"\frac{3x}{y}", "3x/y"], ["3", "3x", r"\frac{3}{y}"]),
    "units behind a space": (
        r"\frac{1}{2}",
        [r"\frac{1}{2} mg", r"\frac{1}{2} kW", r"\frac{1}{2}km", r"\frac{1}{2}cm", r"0.5kg", "0.5 in"],
        [r"\frac{1}{2}mg", r"\frac{1}{2}kW", r"\frac{1}{2}mi", r"\frac{1}{2}rad", "0.5mg"],
    ),
    "variables behind pi": (r"2\pi", [r"2\pi\text{ cm}"], [r"2\pi mg", r"2\pi in", r"2\pi Rs"]),
    "letters": (
        "B and D",
        ["B, D", "D and B", "D,B", r"B \text{ and } D", r"\text{B and D}", "B or D", "B and D."],
        ["B", "BD", "A and D", "B, C and D"],
    ),
    "three letters": ("A, B and D", ["D, A, B", "A, B, and D", r"A, D \text{ or } B"], ["A and B", "ABD"]),
    "names of people": ("Ann and Bob", ["ann and bob", r"\text{Ann and Bob}."], ["Ann", "Bob or Eve"]),
    "primes": ("f'", ["f^{\\prime}", "f'.", r"f'\,"], ["f", "f''", "g'"]),
    "no primes": ("A", ["'A'", "*A*", "**A.**", "_A_", "`A`"], ["A'", "A^*", "A_1"]),
    "wide gaps": (
        "100, 200",
        [r"100 \quad 200", r"100\qquad200", r"100 \hfill 200", r"$100$\quad \quad$200$", r"100,\quad 200"]
        + [r"100 \quad\text{and}\quad 200"],
        ["100200", "300", "20000"],
    ),
    "wide gaps before a fraction": (
        r"3, \frac{1}{2}",
        [r"3 \quad 1/2", r"3\quad\frac{1}{2}"],
        ["3.5", r"3\ 1/2"],
    ),
    "wide gaps before a sign": ("3, -4", [r"3 \quad -4"], ["-1"]),
    "words": (
        "infinitely many",
        [r"\text{infinitely many}", r"\textbf{Infinitely many.}"],
        ["many", r"\infty"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_in_both_directions(kind):
    """Bug: the wrong number earns 1 and the right one 0. Break: `_grade(..., strict=True)`."""
    gold, right, wrong = KINDS[kind]
    assert {answer: math_reward(boxed(answer), gold) for answer in right} == dict.fromkeys(right, 1.0)
    if kind != "equations":  # of a gold f(3) = 42, Math-Verify wants an equation
        assert {answer: math_reward(boxed(gold), answer) for answer in right} == dict.fromkeys(right, 1.0)
    assert {answer: math_reward(boxed(answer), gold) for answer in wrong} == dict.fromkeys(wrong, 0.0)


@pytest.mark.parametrize(
    ("response", "gold", "reward"),
    [
        (r"I get $\boxed{7}$. The final answer is $\boxed{", "7", 0.0),
        (r"I get $\boxed{7}$. The final answer is $\boxed{8", "7", 0.0),
        (r"I get $\boxed{7}$. The final answer is $\boxed{}$.", "7", 0.0),
        (r"I get $\boxed{7}$. The final answer is $\boxed{\,}$.", "7", 0.0),
        (r"I get $\boxed{7}$. The final answer is $\boxed{\frac}$.", "7", 0.0),
        (r"I get $\boxed{8}$, no, $\boxed{7}$.", "7", 1.0),
        (r"I get \fbox{7}, then \fbox{8}.", "7", 0.0),
        (r"\boxed 42", "42", 1.0),
        (r"So $\boxed\frac{1}{2}$.", "0.5", 1.0),
        (r"$\boxed{1}$ or $\boxed{2}$", "1, 2", 1.0),
        (r"$x_1 = \boxed{1} \quad\text{and}\quad x_2 = \boxed{2}$", "1, 2", 1.0),
        (r"$\boxed{1}\boxed{2}$", "12", 0.0),
        (r"$\boxed{x = \boxed{7}}$", "7", 1.0),
        (r"$\boxed{45}$ percent", "0.45", 1.0),
        (r"So it is $12\,345$.", "12345", 1.0),  # no box
        (r"So it is $12\,345$.", "357", 0.0),
        (r"\[ n^2 = 42 \]", "42", 0.0),
    ],
)
def test_the_last_box(response, gold, reward):
    """Bug: a box that is empty or cut off earns what an earlier one would. Break: `continue` for `break`."""
    assert math_reward(response, gold) == reward


def test_strict_is_math_verify_alone():
    """Bug: the switch for the paper's setting changes nothing in the workers. Break: str(False) there."""
    item = (boxed("12 345"), "12345")
    assert math_reward(*item) == 1.0 and math_reward(*item, strict=True) == 0.0
    with MathVerifier(workers=1) as meant, MathVerifier(workers=1, strict=True) as strict:
        assert (meant.score([item]), strict.score([item])) == ([1.0], [0.0])
        assert (meant.unparsable(["$18"]), strict.unparsable(["$18"])) == ([], [0])
        assert rewards.grader_content(meant) != rewards.grader_content(strict)
        assert Path(grade.__file__).with_name("as_meant.py").read_text() in rewards.grader_content(meant)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("6 / 2 = 3\n#### 3", "3"),
        ("#### 1,234", "1234"),
        ("#### -$2,500,000.50", "-$2500000.50"),
        ("#### (3, 4)", "(3, 4)"),
        ("#### 1, 2", "1, 2"),
        ("#### (1,234)", "(1,234)"),
    ],
)
def test_only_commas_between_thousands_go(answer, gold):
    """Bug: GSM8K's `#### (3, 4)` became (3 4). Break: `.replace(",", "")`."""
    assert data.gold_answer({"answer": answer}) == ("answer", gold)


def test_bench_grades_rows(tmp_path, monkeypatch):
    """Bug: gold_answer's result is not a gold, so the table stops. Break: `gold = gold_answer(...)` there."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import grading

    (tmp_path / "math").mkdir()
    rows = [
        {"problem": "6 / 2?", "answer": "It is 3\n#### 3"},
        {"problem": "1 + 1?", "answer": "2", "solution": r"It is $\boxed{2}$."},
        {"problem": "Who?"},  # no gold
    ]
    (tmp_path / "math/math500.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grading.main(["--data", str(tmp_path), "--out", str(tmp_path / "numbers.json"), "--workers", "1"])
    table = {row["set"]: row for row in json.loads((tmp_path / "numbers.json").read_text())["sets"]}
    assert table["math500: its solutions"]["right after"] == 1
    assert table["math500: golds in a box"]["golds"] == 2
    assert all(row["right after"] == row["responses"] for row in table.values()) and len(table) == 5


# Where people_cases.jsonl calls an answer right or wrong, and the grader, for a reason, does not.
ARGUED = {
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"): "Math-Verify compares 15 digits after the point",
    (r"(-\infty, 2]", r"x \le 2"): "Math-Verify is told not to take relations for intervals, as in the paper",
    (r"(-\infty, -1) \cup (3, \infty)", r"x < -1 \text{ or } x > 3"): "the same",
    ("-1", "i^2"): "i may be a variable, and Math-Verify takes it for one",
    (r"\frac{1}{\sqrt{n}}", r"\sqrt{1/n}"): "they differ where n < 0",
    ("6", "6, 6"): "a double root is often written twice; Math-Verify compares sets",
}


@pytest.mark.skipif(not GRADING.exists(), reason="shared/data/math_grading is not here")
def test_people_cases():
    """Bug: a change for one way of writing costs another. Break: leave out any entry of LAYOUT or NUMBERS."""
    cases = list(map(json.loads, (GRADING / "people_cases.jsonl").read_text().splitlines()))
    with MathVerifier(workers=2) as verifier:
        scores = verifier.score([(case["response"], case["gold"]) for case in cases])
    different = [c for c, score in zip(cases, scores, strict=True) if score != c["expected"]]
    argued = [
        c for c in different if any(g == c["gold"] and rf"\boxed{{{a}}}" in c["response"] for g, a in ARGUED)
    ]
    assert len(cases) == 327 and [c for c in different if c not in argued] == []


HOSTILE = [
    "{", "}", r"\boxed{", r"\boxed", r"\text{", r"\mathbf{", "1 ", "1", "1.", "12 345 ", "{,}1", "1/", "1e1",
    "5 a", "5 km ", "1(a", "$", "$$a", r"\[", r"\(a", "=", "a=", " ", "\n", "\\", "\\\\", ".", "*", ",", "√",
    "²", "½", "\u0301\u0323", "²x", r"\, ", "~", r"\left", r"\color{a", "a_{", "1^", r"\begin{array}{c",
    r"\\[", r"\\(", r"\quad ", "5 million ",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_is_linear(piece):
    """Bug: what a model writes makes a pattern backtrack. Break: `[ .]+$` for rstrip in _stripped."""
    start = time.process_time()
    for text in (piece * (20_000 // len(piece)), "1" + piece * (20_000 // len(piece)) + "x"):
        (
            as_meant(text),
            boxed_as_meant(text),
            boxed_as_meant(rf"\boxed{{{text}}}"),
            boxed_as_meant(f"${text}$"),
        )
    assert time.process_time() - start < 3
