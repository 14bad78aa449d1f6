"""Every line of the pages is typed by a newcomer, who sees what stands there."""

import pytest

from pages import sessions


@pytest.mark.parametrize("name", sessions.pages())
def test_what_the_page_shows_is_what_is_seen(name: str) -> None:
    played = sessions.play(name)
    different = [sessions.difference(*one) for one in played if not sessions.is_as_shown(*one[1:])]
    assert not different, "\n\n".join(different)
