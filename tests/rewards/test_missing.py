"""When too many rewards are missing."""

from grao_lightning.rewards.missing import MissingWindow


def test_only_a_full_window_can_exceed_the_limit_and_old_steps_leave_it():
    window = MissingWindow(3, 0.5)
    assert [window.exceeded_by(share) for share in (1.0, 1.0)] == [None, None]
    assert window.exceeded_by(0.25) == 0.75  # (1 + 1 + 0.25) / 3
    assert window.exceeded_by(0.25) is None  # (1 + 0.25 + 0.25) / 3 = 0.5, not above it
    assert window.exceeded_by(0.0) is None


def test_a_limit_of_1_is_never_exceeded():
    window = MissingWindow(1, 1.0)
    assert window.exceeded_by(1.0) is None
