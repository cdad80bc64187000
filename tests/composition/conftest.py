from tests.pictures import pictures_are_drawn, pictures_are_not_drawn  # noqa: F401
