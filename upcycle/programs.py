"""Small Python programs that solve math exercises and print the answers: code and math in one text.

Every exercise is an ordinary function. Its docstring is the question, with the arguments' names in braces; what a
program says its output is comes from running the function.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator


def greatest_common_divisor(a, b):
    """Find the greatest common divisor of {a} and {b}."""
    while b:
        a, b = b, a % b
    return a


def least_common_multiple(a, b):
    """Find the least common multiple of {a} and {b}."""
    multiple = a
    while multiple % b:
        multiple += a
    return multiple


def factorial(n):
    """Compute {n} factorial."""
    product = 1
    for k in range(2, n + 1):
        product *= k
    return product


def is_prime(n):
    """Is {n} prime?"""
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def prime_factors(n):
    """Find the prime factors of {n}."""
    factors, d = [], 2
    while n > 1:
        while n % d == 0:
            factors.append(d)
            n //= d
        d += 1
    return factors


def divisors(n):
    """List the factors of {n}."""
    return [d for d in range(1, n + 1) if n % d == 0]


def fibonacci(n):
    """What is Fibonacci number {n}?"""
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def digit_sum(n):
    """Add the digits of {n}."""
    return sum(int(digit) for digit in str(n))


def to_binary(n):
    """Write {n} in binary."""
    bits = ""
    while n:
        bits = str(n % 2) + bits
        n //= 2
    return bits


def to_hexadecimal(n):
    """Write {n} in hexadecimal."""
    return format(n, "x")


def triangle_area(base, height):
    """Find the area of a triangle with base {base} and height {height}."""
    return base * height / 2


def rectangle_perimeter(width, height):
    """Find the perimeter of a rectangle of {width} by {height}."""
    return 2 * (width + height)


def hypotenuse(a, b):
    """Find the hypotenuse of a right triangle with legs {a} and {b}."""
    return round((a**2 + b**2) ** 0.5, 2)


def circle_area(radius):
    """Find the area of a circle with radius {radius}."""
    return round(3.141592653589793 * radius**2, 2)


def cuboid_volume(a, b, c):
    """Find the volume of a cuboid with sides {a}, {b} and {c}."""
    return a * b * c


def cube_surface(side):
    """Find the surface area of a cube with side {side}."""
    return 6 * side**2


def power(base, exponent):
    """Raise {base} to the power {exponent}."""
    result = 1
    for _ in range(exponent):
        result *= base
    return result


def remainder(a, b):
    """What remains when {a} is divided by {b}?"""
    return a - b * (a // b)


def arithmetic_series(first, step, terms):
    """Add {terms} terms of the series that starts at {first} and grows by {step}."""
    return sum(first + step * k for k in range(terms))


def geometric_term(first, ratio, n):
    """Find term {n} of the geometric series with first term {first} and ratio {ratio}."""
    return first * ratio ** (n - 1)


def simple_interest(principal, rate, years):
    """Find the simple interest on {principal} dollars at {rate} percent for {years} years."""
    return principal * rate * years / 100


def compound_amount(principal, rate, years):
    """What do {principal} dollars become at {rate} percent compound interest in {years} years?"""
    return round(principal * (1 + rate / 100) ** years, 2)


def combinations(n, k):
    """In how many ways can {k} objects be picked from {n}?"""
    count = 1
    for i in range(k):
        count = count * (n - i) // (i + 1)
    return count


def mean(a, b, c, d):
    """Find the mean of {a}, {b}, {c} and {d}."""
    values = [a, b, c, d]
    return sum(values) / len(values)


def median(a, b, c, d, e):
    """Find the median of {a}, {b}, {c}, {d} and {e}."""
    return sorted([a, b, c, d, e])[2]


def manhattan_distance(x1, y1, x2, y2):
    """Find the grid distance between ({x1}, {y1}) and ({x2}, {y2})."""
    return abs(x1 - x2) + abs(y1 - y2)


def determinant(a, b, c, d):
    """Find the determinant of the matrix [{a}, {b}; {c}, {d}]."""
    return a * d - b * c


def fahrenheit(celsius):
    """Convert {celsius} degrees Celsius to Fahrenheit."""
    return celsius * 9 / 5 + 32


def squares_sum(n):
    """Add the first {n} square numbers."""
    return sum(k * k for k in range(1, n + 1))


def collatz_steps(n):
    """How many Collatz steps lead from {n} to 1?"""
    steps = 0
    while n != 1:
        n = 3 * n + 1 if n % 2 else n // 2
        steps += 1
    return steps


# Exercise -> lowest and highest number drawn for each of its arguments.
EXERCISES: dict[Callable, tuple[int, int]] = {
    greatest_common_divisor: (4, 400),
    least_common_multiple: (2, 60),
    factorial: (2, 15),
    is_prime: (2, 999),
    prime_factors: (10, 900),
    divisors: (10, 300),
    fibonacci: (3, 40),
    digit_sum: (100, 99999),
    to_binary: (5, 900),
    to_hexadecimal: (20, 5000),
    triangle_area: (2, 60),
    rectangle_perimeter: (2, 90),
    hypotenuse: (2, 40),
    circle_area: (1, 50),
    cuboid_volume: (2, 30),
    cube_surface: (2, 40),
    power: (2, 9),
    remainder: (3, 300),
    arithmetic_series: (2, 40),
    geometric_term: (2, 7),
    simple_interest: (2, 90),
    compound_amount: (2, 40),
    combinations: (3, 18),
    mean: (1, 99),
    median: (1, 99),
    manhattan_distance: (-30, 30),
    determinant: (-12, 12),
    fahrenheit: (-30, 110),
    squares_sum: (2, 60),
    collatz_steps: (2, 300),
}


def documents(rng_seed: int) -> Iterator[str]:
    """Endless documents of six different programs each; document k depends on rng_seed and k alone."""
    number = 0
    while True:
        draw = random.Random(f"math_programs/{rng_seed}/{number}")
        yield "\n\n".join(program(solve, draw) for solve in draw.sample(list(EXERCISES), k=6))
        number += 1


def program(solve: Callable, draw: random.Random) -> str:
    """The exercise with numbers drawn for its arguments: its function, and a call that shows the output."""
    signature, docstring, *body = inspect.getsource(solve).splitlines()
    values = {argument: draw.randint(*EXERCISES[solve]) for argument in inspect.signature(solve).parameters}
    question, answer = docstring.format(**values), solve(**values)
    name = draw.choice((solve.__name__, f"solve_{solve.__name__}", f"compute_{solve.__name__}", "solution"))
    signature = signature.replace(solve.__name__, name, 1)
    asked_in_comment = [question.strip().replace('"""', "# ", 1).removesuffix('"""'), signature]
    opening = draw.choice(([signature, question], asked_in_comment))
    call = f"{name}({', '.join(f'{argument}={value}' for argument, value in values.items())})"
    ending = draw.choice((
        [f"print({call})  # {answer}"],
        [f"answer = {call}", f"print(answer)  # {answer}"],
        [f"result = {call}", f"assert result == {answer!r}", "print(result)"],
    ))  # fmt: skip
    return "\n".join([*opening, *body, "", "", *ending]) + "\n"
