"""What our values are: frozen dataclasses whose classes cost next to nothing to make."""

from dataclasses import MISSING, Field, FrozenInstanceError, dataclass, field, make_dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, dataclass_transform

if TYPE_CHECKING:
    from inspect import Signature


class _OfFields:
    """``__signature__`` of a class whose fields are given to it: as of a dataclass, and made where somebody asks."""

    def __get__(self, value: object, kind: type["Value"]) -> "Signature | None":
        from inspect import signature

        if kind is Value or kind.__init__ is not Value.__init__:
            return None
        given = [
            (one.name, one.type, field(default=one.default, default_factory=one.default_factory))
            for one in kind.__dataclass_fields__.values()
        ]
        return signature(make_dataclass(kind.__name__, given))


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Value:
    """
    Base of our values. What a subclass annotates are its fields, as in a frozen dataclass, which it is to type checkers, and
    to `fields`, `replace` and `asdict` of `dataclasses`, and to `inspect.signature`. A caller's subclass is one in the same
    way, without a decorator: with one it is a TypeError, or a class of which nothing can be made.

    All share the methods below. `dataclass` would compile six for each class, and the seventy classes that the dry run of a
    merge imports would take a sixth of its time.
    """

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
        __match_args__: ClassVar[tuple[str, ...]]
    _compared: ClassVar["attrgetter[Any]"]
    __signature__: ClassVar[_OfFields] = _OfFields()

    def __init_subclass__(cls) -> None:
        dataclass(init=False, repr=False, eq=False)(cls)
        cls._compared = attrgetter(*(name for name in cls.__match_args__ if cls.__dataclass_fields__[name].compare))

    def __init__(self, *given: object, **named: object) -> None:
        names = self.__match_args__
        values = {**dict(zip(names, given, strict=False)), **named}
        missing = [name for name in names if name not in values]
        if not len(values) == len(given) + len(named) == len(names) - len(missing):
            raise TypeError(f"{type(self).__name__}({', '.join(names)}): given {len(given)} and {', '.join(named)}")
        values |= {name: _default(self.__dataclass_fields__[name]) for name in missing}
        vars(self).update(values)
        self.__post_init__()

    def __post_init__(self) -> None:
        """See what must hold between the fields."""

    def __eq__(self, other: object) -> bool:
        return self._compared(self) == self._compared(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._compared(self))

    def __repr__(self) -> str:
        names = (name for name in self.__match_args__ if self.__dataclass_fields__[name].repr)
        shown = (f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__qualname__}({', '.join(shown)})"

    if not TYPE_CHECKING:  # a checker knows which names there are, and that they are read only

        def __setattr__(self, name: str, value: object) -> NoReturn:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")

        def __delattr__(self, name: str) -> NoReturn:
            raise FrozenInstanceError(f"cannot delete field {name!r}")


def _default(one: "Field[Any]") -> object:
    """Raises TypeError where there is none."""
    if one.default_factory is not MISSING:
        return one.default_factory()
    if one.default is MISSING:
        raise TypeError(f"{one.name} is missing")
    return one.default
