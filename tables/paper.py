"""The numbers of the paper's tables (arXiv 2506.21495), under our rows' names.

Each is a number in percent and what the paper calls its standard error (in brackets there; None: not given).
"""

COLUMNS: dict[str, tuple[str, ...]] = {
    "table1": ("Math500", "NuminaMath", "AMC23"),
    "table2": ("AlpacaEval LC", "Arena-Hard"),
    "table3": ("Math500", "AMC23", "AlpacaEval LC", "Arena-Hard"),
    "table5": ("Math500", "NuminaMath", "AMC23"),
}
ROWS: dict[str, dict[str, tuple[tuple[float, float | None], ...]]] = {
    "table1": {
        "seed": ((47.4, 1.6), (33.9, 0.6), (23.7, 5.2)),
        "dpo-inf": ((53.7, 1.6), (36.4, 0.6), (28.8, 7.0)),
        "dpo-100": ((58.9, 1.2), (39.3, 0.4), (35.1, 5.3)),
        "dpo-10": ((57.2, 1.1), (39.4, 0.5), (31.4, 4.3)),
        "dpo-1": ((58.7, 1.2), (39.6, 0.5), (32.9, 5.2)),
        "grpo": ((58.1, 1.3), (38.8, 0.5), (33.6, 5.1)),
    },
    "table2": {
        "seed": ((27.3, 1.3), (21.3, None)),
        "dpo-inf": ((53.2, 1.5), (38.3, None)),
        "dpo-10": ((81.6, 1.0), (59.4, None)),
        "dpo-5": ((78.7, 1.2), (60.7, None)),
        "dpo-1": ((83.1, 1.0), (60.1, None)),
        "grpo": ((75.2, 1.2), (55.0, None)),
    },
    "table3": {
        "seed": ((47.4, None), (23.7, None), (20.9, None), (21.3, None)),
        "chat-only": ((35.0, None), (15.0, None), (83.1, None), (60.1, None)),  # dpo-1 of table2
        "math": ((58.7, None), (32.9, None), (31.4, None), (34.8, None)),
        "both": ((50.2, None), (22.3, None), (71.0, None), (57.7, None)),
        "chat-then-math": ((53.4, None), (25.3, None), (82.2, None), (69.0, None)),
    },
    "table5": {
        "grpo-4": ((55.7, 1.4), (37.7, 0.5), (30.6, 5.2)),
        "grpo": ((58.1, 1.3), (38.8, 0.5), (33.6, 5.1)),
        "grpo-12": ((57.6, 1.2), (38.4, 0.6), (32.2, 5.9)),
    },
}
