"""Forty short questions on eight subjects, as users of a small model ask them."""

from __future__ import annotations

SUBJECTS: dict[str, tuple[str, ...]] = {
    "writing": (
        "Write a short thank-you note to a colleague who helped me move.",
        "Describe a quiet harbour at dawn in four sentences.",
        "Write the first lines of a story about a lost umbrella.",
        "Suggest a friendlier way to say: your report is late again.",
        "Write a haiku about rain on a tin roof.",
    ),
    "python": (
        "Write a Python function that reverses a string.",
        "How do I read a CSV file in Python?",
        "Write a Python function that checks whether a number is prime.",
        "What does a list comprehension do? Give an example.",
        "Write a Python class for a bank account with deposit and withdraw.",
    ),
    "science": (
        "Why is the sky blue?",
        "How does a vaccine protect against a disease?",
        "What is the difference between a planet and a star?",
        "Explain photosynthesis to a child.",
        "Why does ice float on water?",
    ),
    "history": (
        "Who was Cleopatra?",
        "What caused the French Revolution?",
        "When was the printing press invented, and why did it matter?",
        "Tell me about the Silk Road.",
        "What happened at the Battle of Hastings?",
    ),
    "arithmetic": (
        "A train travels 60 miles in 1.5 hours. How fast is it?",
        "What is 15 percent of 240?",
        "If I have 3 boxes with 12 apples each and eat 5, how many are left?",
        "What is the area of a circle with a radius of 4?",
        "Solve for x: 2x + 7 = 19.",
    ),
    "cooking": (
        "How do I make pancakes?",
        "What can I cook with rice, eggs and spinach?",
        "How long should I boil an egg?",
        "Give me a recipe for tomato soup.",
        "How do I keep bread fresh?",
    ),
    "health": (
        "How can I sleep better?",
        "What are good stretches for a stiff neck?",
        "How much water should I drink in a day?",
        "What are the benefits of walking every day?",
        "How do I start running?",
    ),
    "travel": (
        "What should I see in Lisbon in two days?",
        "What should I pack for a week in the mountains?",
        "How do I travel cheaply in Europe?",
        "Suggest a weekend trip with small children.",
        "What is the best time of year to visit Japan?",
    ),
}


def prompts() -> list[str]:
    """All of them, one subject after the other in turn, so that neighbours differ."""
    return [question for turn in zip(*SUBJECTS.values(), strict=True) for question in turn]
