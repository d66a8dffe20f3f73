"""Whether a dataset is large enough to be divided, learned from and scored."""

from stages.errors import UserError

LEAST_OF_CLASS = 20  # images of each class, of all splits together
LEAST_WITHOUT = 100  # images where there are no classes
NAMED = 20  # classes that an error names


def refuse_too_few(class_names: list[str], counts: list[int]) -> None:
    """Refuse a dataset that is too small, in one message that names every class with too few images.

    Args:
        class_names: one name alone: there are no classes.
        counts: images of each class, of train, validation and test together, after some were dropped.

    Raises:
        UserError: a class has fewer than LEAST_OF_CLASS images, or all together fewer than LEAST_WITHOUT where there are no
            classes.
    """
    if len(class_names) == 1:
        if counts[0] < LEAST_WITHOUT:
            raise UserError(
                f"{_images(counts[0])} without classes are too few; the least that works is {LEAST_WITHOUT}: add images"
            )
        return
    few = sorted((count, place) for place, count in enumerate(counts) if count < LEAST_OF_CLASS)
    if few:
        named = ", ".join(f"{class_names[place]!r} ({count})" for count, place in few[:NAMED])
        more = f" and {len(few) - NAMED} more" * (len(few) > NAMED)
        raise UserError(
            f"{len(few)} of {len(class_names)} classes have too few images: {named}{more}; the least that works is "
            f"{LEAST_OF_CLASS} of each class: add images, or take these classes out; if these are no classes, say `reader: folder`"
        )


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
