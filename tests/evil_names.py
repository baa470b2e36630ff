"""Names that a stranger's file may contain, each meant to attack a reader of what affectlens writes."""

EVIL = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '<a href="javascript:alert(1)">click</a>',
    "<b>bold</b><br>",
    '" onmouseover=alert(1) x="',
    "' onmouseover=alert(1) x='",
    "</title></style></textarea><!--",
    "&lt;i&gt;&amp;&#60;",  # to be shown as it is, neither read as HTML nor escaped twice
    r"$\href{javascript:alert(1)}{x}$ \(x\) $$y$$",  # TeX, for MathJax
    "%{x} %{customdata} <extra>x</extra> %s {0}",  # plotly's templates, and Python's
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",  # a terminal's
    "gate\nforged: line\r\nanother\x0b\x0c\x85\u2028\u2029line",
    "\u202egnp.exe \u2066isolated\u2069 a\u200bb\ufeff\u00ad",  # bidi, zero width
    "\U000e0067\U000e0062 tags \U000e007f",
    "fillers \u115f\u1160\u3164\uffa0\u2800\ufe01\U000e0100",
    "Z" + "\u0301" * 300,  # a column of accents over the lines around
    "\ue000 \ufffe \U000f0000 private",
    "=cmd|'/c calc'!A1",
    " \t=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\uff1d1+1",
    "x,=1+1;=1+1\t=1+1\n=1+1",
    "'",
    "''=1",
    "",
    "nan",
    "007",
    "a\0b",
    "| cell | [link](javascript:alert(1)) ![image](http://x/y) `code` **b** ~~s~~ \\",
    r"\input{/etc/passwd} ^^5cinput #1 $x$ ~ _ & % {",
    "[1em] * after a line's end",
    '"quoted" `x` ${y}',
    "../../../../etc/passwd",
    "x" * 100_000,
    "many " * 20_000,
)
