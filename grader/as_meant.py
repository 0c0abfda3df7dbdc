r"""Write a gold or an answer as people mean it, for Math-Verify to judge.

    as_meant(r"\text{12 345 euros.}")             '12345': what to parse, of a gold and of an answer alike
    boxed_as_meant(r"so $x = \boxed{7\,}$.")      '$\\boxed{7}$': what to grade of a response

The paper grades with Math-Verify alone, which reads LaTeX: there `12 345` are two numbers (it adds them),
`20 euros` a product of letters, and `\boxed{7.}` nothing. Both functions are pure, and linear in the length
of the text, which a model may have written: no pattern here has two ways to match the same characters.
"""

import math
import re
import unicodedata

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
PERCENT = re.compile(r"(?:[\s$]|\\[)\]])*(?:\\?%|per ?cent\b)")  # after a box
FORMULA = re.compile(  # opening, content, closing
    r"(?<!\\)(\$\$)([^$]+)(\$\$)|(?<![\\$])(\$)([^$\n]+)(\$)|"
    r"(?<!\\)(\\\[)((?:[^\\]|\\[^][])+)(\\\])|(?<!\\)(\\\()((?:[^\\]|\\[^()])+)(\\\))"
)

SYMBOLS = {  # where Unicode's plain form (NFKC) is not LaTeX
    **{"∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot "},
    **{"÷": r"\div ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^{\circ}", "∛": r"\sqrt[3]"},
    **dict.fromkeys("−–—⁻", "-") | {"⟨": "(", "⟩": ")", "、": ",", "。": ".", "\u2044": "/"},
    **dict.fromkeys("€£¥₹₽₩¢“”„\u200b\ufeff", ""),
}

# Commands that change how their argument looks, not what it says: they and its braces are removed.
LOOKS = (
    "boxed|fbox|mathbf|boldsymbol|bm|mathsf|mathit|mathtt|underline|emph|displaystyle|textstyle|scriptstyle|"
    "bf|rm|it|sf|tt|bfseries|tiny|small|normalsize|large|Large|LARGE|huge|Huge"
)
GROUP = re.compile(
    rf"(\\(?:{LOOKS})(?![A-Za-z])\s*|\\(?:textcolor|color|colorbox)\s*\{{[^{{}}]*\}}\s*)(\{{?)|\\.|[{{}}]",
    re.DOTALL,
)
LAYOUT = [  # after these only plain spaces, braces and \text are left; a line's end is a comma
    (
        re.compile(r"\\!|\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*(?:\.(?!\d))?|\\?\$|(?<!\\)\\[][()]"),
        "",
    ),
    (  # between numbers, a wide gap is a comma
        re.compile(
            r"(?<=\d)(?:\s|~|\\[ ,;:>])*\\(?:q?quad|hfill)(?![A-Za-z])"
            r"(?:\s|~|\\[ ,;:>]|\\(?:q?quad|hfill)(?![A-Za-z]))*(?=-?(?:\.?\d|\\[dt]?frac))"
        ),
        ", ",
    ),
    (re.compile(r"(?<!\\)\\[ ,;:>\n]|~|\\(?:q?quad|thinspace|hfill)(?![A-Za-z])|\\text\s*\{\s*\}"), " "),
    (re.compile(r"\\(?:text(?:bf|rm|it|normal|sf|tt|up)|mbox|hbox)(?![A-Za-z])\s*"), r"\\text"),
    (re.compile(r"\\(?:begin|end)\s*\{(?:aligned|align\*?|gathered|split|cases)\}"), " "),
    (re.compile(r"\\begin\s*\{array\}\s*\{[lcr| ]*\}|\\end\s*\{array\}"), " "),
    (re.compile(r"\\sqrt ?\((?=[^()]*\))"), "sqrt("),  # Math-Verify repairs it
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\degree(?![A-Za-z])"), r"^{\\circ}"),
    (re.compile(r"(?:\\pounds|\\euro|\\textdollar)(?![A-Za-z])"), ""),
    (re.compile(r"\s+"), " "),
]
BEFORE, AFTER = " ,;:`*\"'_=", ' .,;:`"?\\'  # marks of a sentence or of Markdown, around an answer
PAIRED = "*_'"  # after an answer only if before it too: A' is not A
LABEL = re.compile(
    r"(?i) ?(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?(?:answer|result|solution|value)"
    r"(?: is| equals| ?:| ?=)+ ?|(?:about|approximately|approx\.?|roughly|around|exactly)(?![a-z]) ?|"
    r"(?-i:USD|EUR|GBP) ?(?=[-+]?(?:\.?\d|\\[dt]?frac))|(?-i:Rs\.?) ?(?=\d)|"
    r"\\(?:approx|sim|simeq|therefore|Rightarrow|implies)(?![A-Za-z]) ?"
)
WORDS = re.compile(r"(?:\\text ?\{ ?)?([A-Za-z](?:[A-Za-z' -]*[A-Za-z])?)[ .]*\}?")
LETTER_LIST = re.compile(  # B and D; A, B or C
    r"[A-Za-z](?:(?: ?,)?(?: ?\\text ?\{ ?(?:and|or) ?\} ?| (?:and|or) )[A-Za-z]| ?, ?[A-Za-z])+"
)
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")

RUN = re.compile(r"(?<![\w.^\\])\d+(?:\.\d+)?(?: \d+(?:\.\d+)?)+(?: ?/ ?\d+|,\d\d?(?![\d ]))?")
NUMBERS = [
    (re.compile(r"\\([dtc]?frac|[dt]?binom) ?(\d) ?(\d)"), r"\\\1{\2}{\3}"),  # \frac 1 2
    (  # 1{,}000{,}000; any other {,} is LaTeX's decimal comma
        re.compile(r"(?<![\w.])(\d+)((?: ?\{ ?, ?\} ?\d+)+)"),
        lambda m: _with_commas(re.findall(r"\d+", m[0])),
    ),
    (RUN, lambda m: _with_spaces(m[0], m.string[m.end() : m.end() + 1])),
    (  # 6.02e23, 1e-07; 3e-2 is left: it may be three times Euler's number, less two
        re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)([eE])([+-]?\d{1,3})(?![\w.])"),
        lambda m: m[0] if re.fullmatch(r"(?!1e)\d+e[+-]\d", m[0]) else rf"{m[1]} \times 10^{{{int(m[3])}}}",
    ),
    (re.compile(r"(?<=\d) ?[xX*] ?(?=10 ?\^)"), r" \\times "),
    (re.compile(r"\^ ?([-+]?\d+)"), r"^{\1}"),
    (  # 0.1\overline{6}
        re.compile(r"(?<![\d.])(\d{0,20})\.(\d{0,20})\\(?:overline|dot|bar) ?\{(\d{1,20})\}"),
        lambda m: _repeating(m[1] or "0", m[2], m[3]),
    ),
]

FACTORS = {"dozen": 12, "hundred": 100, "thousand": 1000, "lakh": 10**5, "million": 10**6, "crore": 10**7}
FACTORS |= {"billion": 10**9, "trillion": 10**12, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
FACTOR = f"(?:{'|'.join(FACTORS)})"
MANY = re.compile(  # 3 million, 2\text{ hundred thousand people}
    r"(?i)(?:(?<![\d.,])(\d{1,3}(?:,\d{3})+)|(?<=[\d})])) ?(\\(?:text|mathrm) ?\{ ?)?"
    rf"({FACTOR}s?(?: ?{FACTOR}s?){{0,2}})(?![A-Za-z]) ?(\}}?)"
)

ORDINAL = re.compile(
    r"(?:(?<=1)(?:\^?\{?(?:\\text\{)?st)|(?<=2)(?:\^?\{?(?:\\text\{)?nd)|(?<=3)(?:\^?\{?(?:\\text\{)?rd)|"
    r"(?<=\d)(?:\^?\{?(?:\\text\{)?th))(?![A-Za-z])\}{0,2}"
)
BEHIND = r"(?:(?<=[\d})])|(?<=\\pi))"  # after a number
UNIT_IN_TEXT = re.compile(BEHIND + r" ?(?:/ ?)?\\(?:text|mathrm) ?\{([^{}]*)\}(?: ?\^ ?\{?-?\d\}?)?")
UNIT = re.compile(BEHIND + r" ?([^\W\d_][^\d_=,;(){}\\+*<>|^$%]*)(?:\^\{?-?\d\}?)?")
REMARK = re.compile(BEHIND + r" ?\(([^\W\d_][^\d(){}\\+*^=]*)\)")
TEMPERATURE = re.compile(r"(\\circ ?\}?) ?[CFK](?![A-Za-z])")
# Lists of words, with spaces around each: `" cm " in UNITS`.
UNITS = (
    " mm cm dm km in ft yd mi mg kg lb lbs oz ml mL cl dl hr hrs min sec ms pm am mph kmh kph kWh rpm Hz kHz"
    " kW sq cu pcs Rs cc gm ha deg rad USD EUR GBP men boys girls days euros "
)
AFTER_SPACE = " in dm yd mi mg cl dl ms kW cu Rs ha rad "  # without a space, letters may be variables
LETTERS = "msghlLNJWVAKC"  # units of one letter, as in m/s; in a \text{} any but NO_LETTERS
NO_LETTERS = list("eiknxyzB")
FILLERS = " a an the per of each "  # in `7 days a week`
NO_UNITS = (  # they compute, or say something else about the number
    " sin cos tan cot sec log exp mod sqrt choose times plus minus over percent percentage pct infinity inf"
    " theta alpha beta gamma delta omega lambda sigma because since are not but where for when than from with"
    " until "
)
NUMBER_WORDS = (  # 5 squared and 5 tenths are not 5
    " squared cubed factorial half halves third thirds fourths fifths sixths sevenths eighths ninths tenth"
    " tenths hundredth hundredths thousandth thousandths millionths twice tripled millones"
    " millionen mille dozen dozens hundred hundreds thousand thousands lakh lakhs million millions crore"
    " crores billion billions trillion trillions "
)
PRIMED = re.compile(r"([A-Za-z]\w*)('+)")
EQUALS = re.compile(r"(?<![<>!:\\])=")
NAME = re.compile(r"[A-Za-z]'*(?:_\w|_\{[^{}]*\})?(?:\^\{?\*\}?)?")
ARITHMETIC = re.compile(r"\\(?:[dt]?frac|sqrt|cdot|times)(?![A-Za-z])")


def box_at(text: str, start: int) -> str | None:
    r"""The content of the box that begins at `start`, its braces balanced; None if it is cut off.

    `\boxed 7` has no braces: its content ends at the next space or $.
    """
    if text[start : start + 1] != "{":
        return re.compile(r"[^\s$]*").match(text, start)[0]
    end = _closing(text, start)
    return None if end is None else text[start + 1 : end]


def _closing(text, start):
    """Where the brace at `start` is closed, or None. A brace after a backslash does not count."""
    depth = 0
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    return None


def boxed_as_meant(response: str) -> str:
    r"""The answer of a response, as meant: its last box, and those that belong to it, as one `$\boxed{...}$`.

    Empty if that box is empty or cut off: an earlier box is not the answer. In a response without any box
    only the formulas are rewritten.
    """
    boxes = list(BOX.finditer(response))
    if not boxes:
        return FORMULA.sub(_formula, response)
    contents, start = [], len(response)
    for box in reversed(boxes[-8:]):
        content = box_at(response, box.end())
        if content is None:
            break
        end = box.end() + len(content) + 2 * response.startswith("{", box.end())
        if contents and end > start:  # it holds the boxes found so far
            contents = []
        elif contents and not _together(response[end:start]):
            break
        percent = r"\%" if not contents and PERCENT.match(response, end) else ""
        contents.append(as_meant(content) + percent)
        start = box.start()
    answer = ", ".join(dict.fromkeys(reversed(contents)))
    return rf"$\boxed{{{answer}}}$" if answer else ""


def _formula(match):
    opening, content, closing = (part for part in match.groups() if part is not None)
    return opening + (as_meant(content) or content) + closing


def _together(between):
    r"""Whether boxes with this between them are one answer: `\boxed{1}$ and $x = \boxed{2}`."""
    words = re.sub(r"\\[A-Za-z]+|(?<![A-Za-z])(?:and|or)(?![A-Za-z])", "", between)
    if len(between) > 70 or re.search(r"[A-Za-z]{2}|[.:!?]", words):
        return False
    side_by_side = len(between) < 10 and not re.search(r"[$\n]|\\[)\]]", between)
    return side_by_side or bool(re.search(r"[,;]|and|or", between))


def as_meant(text: str) -> str:
    r"""A gold, or a box's content, in LaTeX that means to Math-Verify what it means to people.

    >>> [as_meant(text) for text in ("3 1/2", "60 km/h", r"\text{x = 6}", "1e-07", "6 = x", "２½")]
    ['3\\frac{1}{2}', '60', 'x = 6', '1 \\times 10^{-7}', 'x = 6', '2\\frac{1}{2}']
    """
    text = _without_looks(_in_latex(text))
    for pattern, plain in LAYOUT:
        text = pattern.sub(plain, text)
    if r"\begin" not in text:  # the rows of a matrix stay
        text = re.sub(r"\\\\(?![A-Za-z]{2})", ", ", text)  # \\frac is \frac, escaped twice
    text = TEXT.sub(lambda m: m[1] if _is_said_in_text(m[1]) else m[0], _stripped(text))
    text = _stripped(" ".join(text.split()))
    label = LABEL.match(text)
    text = text[label.end() :] if label else text
    for pattern, plain in NUMBERS:
        text = pattern.sub(plain, text)
    text = MANY.sub(_many, text)
    text = _stripped(_without_units(_stripped(text)))
    words = WORDS.fullmatch(text)
    if words and words[1].lower() == "infinity":
        return r"\infty"
    if words and any(_is_word(word) for word in words[1].split() if word not in ("and", "or")):
        return rf"\text{{{words[1].lower()}}}"  # not a product of letters
    letters = words[1] if words else text
    if LETTER_LIST.fullmatch(letters):
        return ", ".join(re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", letters))
    primed = PRIMED.fullmatch(text)
    if primed:  # Math-Verify drops a '
        primes = r"\prime" * len(primed[2])
        return f"{primed[1]}^{{{primes}}}"
    return _equation(text)


def _in_latex(text):
    """Plain forms of characters beyond ASCII: ２ -> 2, ½ -> \\frac{1}{2}, x² -> x^{2}, √2, ∞, thin spaces."""
    if text.isascii():
        return text
    text = re.sub("([⁰¹²³⁴-⁹⁺⁻ⁿ]+)", r"^{\1}", text)
    text = re.sub("([₀-₉]+)", r"_{\1}", text)
    text = re.sub(r"[^\x00-\x7f]", _character, text)
    text = re.sub(r"√ ?(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}", text)
    return text.replace("√(", "sqrt(").replace("√", r"\sqrt")


def _character(match):
    character = match[0]
    if character in SYMBOLS:
        return SYMBOLS[character]
    digit = unicodedata.decimal(character, None)
    plain = unicodedata.normalize("NFKC", character) if digit is None else str(digit)
    over, slash, under = plain.partition("\u2044")
    return rf"\frac{{{over}}}{{{under}}}" if over and slash and under else plain


def _without_looks(text):
    """Remove the commands of LOOKS, and the braces around their argument."""
    pieces, at, opened = [], 0, []  # opened: for each open brace, whether its command is removed
    for token in GROUP.finditer(text):
        pieces.append(text[at : token.start()])
        at, kept = token.end(), token[0]
        if token[1] is not None:
            argument = pieces[-1].endswith(("^", "_"))  # which needs its braces
            kept = "{" if argument and token[2] else ""
            if token[2]:
                opened.append(not argument)
        elif kept == "{":
            opened.append(False)
        elif kept == "}" and opened and opened.pop():
            kept = ""
        pieces.append(kept)
    return "".join(pieces) + text[at:]


def _stripped(text):
    """Strip the marks around a text, and braces around all of it."""
    text = _without_marks(text)
    for _ in range(3):
        if text.startswith("{") and _closing(text, 0) == len(text) - 1:
            text = _without_marks(text[1:-1])
    return text


def _without_marks(text):
    plain = text.lstrip(BEFORE)
    before = text[: len(text) - len(plain)]
    text = plain.rstrip(AFTER + "".join(mark for mark in PAIRED if mark in before))
    feet = text.rstrip("'")
    return feet if re.fullmatch(r"-?[\d.]+", feet) else text


def _is_said_in_text(words):
    r"""Whether a \text{} holds more than words: `7 days`, `x = 6`, `.`, `apples and 3 pears`, `Answer:`."""
    if not re.search(r"[^\W\d_]", words) or "=" in words:
        return True
    listed = re.search(r"\b(?:and|or) [-+]?\d", words) and not words.lstrip().startswith("(")
    return bool(listed or re.match(r" ?[-+]?\.?\d", words) or LABEL.match(words))


def _joined(groups):
    """Join groups of digits: into one number if they are grouped as in one, else into a list."""
    first, *middle, last = groups
    inside = all(re.fullmatch(r"\d{3}", group) for group in middle)
    thousands = re.fullmatch(r"[1-9]\d{0,2}", first) and inside and re.fullmatch(r"\d{3}(?:\.\d+)?", last)
    decimals = re.fullmatch(r"\d+\.\d{3}", first) and inside and re.fullmatch(r"\d{1,3}", last)
    return ("" if thousands or decimals else ", ").join(groups)


def _with_spaces(run, following):
    """12 345,67 -> 12345.67, 3 1/2 -> 3\\frac{1}{2}, 2.5 10^3 -> 2.5 \\times 10^3, 1 2 -> 1, 2."""
    run, slash, under = run.partition("/")
    run, comma, cents = run.partition(",")
    *whole, last = run.split()
    number = _joined(whole) if len(whole) > 1 else whole[0]
    if slash:
        under = under.strip()
        if last.isdigit() and (len(last), last) < (len(under), under):  # which is last < under
            return rf"{number}\frac{{{last}}}{{{under}}}"
        return f"{_joined([*whole, last])}/{under}"
    if following == "^":
        return rf"{number} \times {last}" if last == "10" else f"{number} {last}"
    number = _joined([*whole, last])
    return number + (("." if number.isdigit() else ",") + cents if comma else "")


def _with_commas(groups):
    number = _joined(groups)
    return ".".join(groups) if "," in number and len(groups) == 2 else number


def _repeating(whole, before, period):
    """0.1\\overline{6} as a fraction."""
    over = int(whole + before + period) - int(whole + before)
    return rf"\frac{{{over}}}{{{'9' * len(period) + '0' * len(before)}}}"


def _many(match):
    """The factors of `hundred thousand`; `2 thousand 5 hundred` is a sum."""
    number, opening, words, closing = match.groups()
    factors = [FACTORS[word] for word in re.findall(FACTOR, words.lower())]
    rest = "" if opening and closing else opening or closing or " "
    following = match.string[match.end() : match.end() + 2].strip()[:1]
    number, plus = (number or "").replace(",", ""), " + " if following.isdigit() else ""
    return rf"{number} \times {math.prod(factors)}{rest}{plus}"


def _without_units(text):
    """Remove words after a number that are not mathematics: `euros`, `km/h`, `th`, `(approximately)`."""
    number = re.search(r"\d|\\pi", text)
    if number is None:
        return text
    head, text = text[: number.start()], text[number.start() :]
    text = TEMPERATURE.sub(r"\1", ORDINAL.sub("", text))
    text = UNIT_IN_TEXT.sub(_unless_unit_in_text, text)
    text = REMARK.sub(lambda m: _gap(m) if _is_unit(m[1]) else m[0], text)
    return head + UNIT.sub(_unless_unit, text)


def _unless_unit_in_text(match):
    if re.fullmatch(r"\W*per ?cent(?:age)?\W*", match[1]):
        return r"\%"
    names = re.findall(r"[^\W\d_]+", match[1])
    number = any(f" {name.lower()} " in NUMBER_WORDS for name in names)
    if number or ("".join(names) in NO_LETTERS and names and not _gap(match)):
        # Math-Verify ignores what is in a \text{}
        return re.sub(r" ?\\(?:text|mathrm) ?\{([^{}]*)\}", r" \1", match[0])
    return _gap(match) if _is_unit(match[1], letters=match[1]) else match[0]


def _unless_unit(match):
    r"""What is left of words after a number, outside of a \text{}, where letters may be variables."""
    words, rest = match[1], match.string[match.end() : match.end() + 2].strip()
    joint = re.search(r"(?<![^\W_])(?:and|or)(?![^\W_])", words)  # 20 euros and 50 cents
    if joint:
        words = words[: joint.start()]
    elif rest and rest != r"\}" and rest[0] not in ",;)]}=" and not rest[0].isdigit():
        return match[0]
    first = re.match(r"[^\W\d_]*", words)[0]
    spaced = match[0].startswith(" ") and not match.string[: match.start()].endswith(r"\pi")
    if f" {first} " in FILLERS or not _is_unit(words, letters=LETTERS if spaced and "/" in words else ""):
        return match[0]
    name = f" {first} "
    if not spaced and first.isascii() and len(first) < 4 and (name not in UNITS or name in AFTER_SPACE):
        return match[0]
    return f" {match[1][joint.start() :]}" if joint else _gap(match)


def _gap(match):
    """What replaces a unit: `3 hours 20 minutes` must not become 320."""
    return ", " if match.string[match.end() : match.end() + 2].strip()[:1].isdigit() else ""


def _is_unit(words, letters=""):
    """Whether all of these words can follow a number. letters: the single letters that can, as in m/s."""
    names = [name for name in re.findall(r"[^\W\d_]+", words) if f" {name} " not in FILLERS]
    return bool(names) and all(_is_word(name) or (len(name) == 1 and name in letters) for name in names)


def _is_word(name):
    """Whether it is a word. A product of variables has no vowel, or is in order: xyz, abcd."""
    if not name.isascii():
        return not re.search("[Ͱ-Ͽ万萬亿億百十半]|千(?![米克瓦])|тысяч|милли", name)  # Greek, numbers
    small = name.lower()
    if f" {name} " in UNITS or f" {small} " in NO_UNITS + NUMBER_WORDS:
        return f" {name} " in UNITS
    return len(name) > 2 and bool(re.search("[aeiou]", small)) and sorted(small) != list(small)


def _equation(text):
    """`6 = x` as `x = 6`; and `n^2 = 42` as `42 = n^2`, which Math-Verify does not take for the number 42.

    An equation in one unknown does not give the unknown's value. One in two, such as `m + n = 42`, names what
    was asked for, and Math-Verify takes its right side.
    """
    sides = [side.strip() for side in EQUALS.split(text)]
    if len(sides) != 2 or "," in text or NAME.fullmatch(sides[0]):
        return text
    left, right = sides
    plain = ARITHMETIC.sub(" ", left)
    unknowns = set(re.findall(r"[A-Za-z](?:_\w|_\{[^{}]*\})?", plain)) - {"e", "i"}
    named = re.search(r"[\\|]|[A-Z]_|\([^A-Za-z()]*\)", plain)  # \sin x, |z|, C_5^2, f(3)
    return f"{right} = {left}" if NAME.fullmatch(right) or (len(unknowns) == 1 and not named) else text
