from ..hostile import run


def test_damaged_files_are_refused_or_read_as_the_same_adapter():
    counts = run(400, seed=1, progress=False)
    assert sum(counts.values()) == 400
    assert {result for _, result in counts} <= {"refused", "the same", "another"}
    assert not [kind for kind, result in counts if result == "another" and kind != "forge"]
    assert sum(count for (_, result), count in counts.items() if result == "refused") > 300
