"""What became of the libraries' own tests, against the reasons why some of them fail here."""

from collections import Counter
from collections.abc import Callable


def report(rows: dict[str, tuple[str, str]], reason_of: Callable[[str], str | None]) -> bool:
    """Prints one line a test and the counts; true if every failure has a reason and every reason a failure.

    Args:
        rows: {"case.test": (outcome, note)}.
        reason_of: why a test, named without its case, fails; `None` if it should pass.
    """
    as_expected = True
    for name, (outcome, note) in rows.items():
        reason = reason_of(name.split(".", 1)[1])
        if outcome == "fail":
            note = f"{reason or 'NO REASON KNOWN'}\n       {note}"
        elif reason and outcome == "pass":
            note = f"NO LONGER FAILS: {reason}"
        as_expected &= (outcome == "fail") == bool(reason) or outcome == "skip"
        print(f"{outcome:5} {name}{f'  — {note}' if note else ''}")
    for case in sorted({name.split(".")[0] for name in rows}):
        counts = Counter(outcome for name, (outcome, _) in rows.items() if name.startswith(f"{case}."))
        print(f"{case}: {counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped")
    return as_expected
