"""Short prompts of many sorts, to which a model's replies are compared."""

from __future__ import annotations

PROMPTS = (
    # Questions with a short answer.
    "What is the capital of Portugal?",
    "Which planet is closest to the Sun?",
    "Who wrote Romeo and Juliet?",
    "How many days are there in a leap year?",
    "What is the boiling point of water at sea level?",
    "Which language is spoken most in Brazil?",
    "What do bees make?",
    "In which season do leaves fall from the trees?",
    # Explanations.
    "Explain why the sky is blue.",
    "How does a refrigerator keep food cold?",
    "Why do we have leap years?",
    "Explain to a child what electricity is.",
    "What is the difference between weather and climate?",
    "How does a vaccine protect people?",
    "Why does bread rise in the oven?",
    "What happens when a country prints too much money?",
    # Code.
    "Write a Python function that checks whether a number is prime.",
    "How do I read a text file line by line in Python?",
    "Write a SQL query that counts the orders of each customer.",
    "What does the command `ls -l` do?",
    "Write a JavaScript function that reverses a string.",
    "Explain what a for loop is, with a short example.",
    # Lists.
    "List five fruits that are red.",
    "Give me three ideas for a birthday party at home.",
    "Name four things to pack for a hike in the mountains.",
    "List the steps for making a cup of tea.",
    "Suggest three names for a small bakery, with a reason for each.",
    "What are some good habits for sleeping better?",
    # Rewriting, shortening, translating.
    "Make this sentence more polite: Send me the report now.",
    "Correct the grammar: She don't has no time yesterday.",
    "Put this into the past tense: The train leaves and the children wave.",
    "Summarize in one sentence: The museum opened in 1920, burned down in 1954, and was rebuilt by its visitors.",
    "Translate into French: Good morning, where is the station?",
    "Rewrite this so that a child understands it: The committee postponed its decision indefinitely.",
    # Arithmetic and reasoning.
    "What is 17 plus 26?",
    "A book costs 12 dollars and a pen costs 3 dollars. How much do two books and four pens cost?",
    "If all cats are animals and Tom is a cat, what is Tom?",
    "A train travels 180 kilometers in two hours. How fast is it?",
    "What comes next: 2, 4, 8, 16?",
    "Anna is taller than Ben, and Ben is taller than Carl. Who is the shortest?",
    # Writing.
    "Write a short poem about the sea.",
    "Begin a story with a lost key.",
    "Write an email to a teacher to say that you are ill today.",
    "Describe a busy market in the morning.",
    "Write a product description for a wooden chair.",
    # Small talk and advice.
    "Hello! How are you today?",
    "Tell me a joke.",
    "I have a job interview tomorrow and I am nervous. What should I do?",
    "Can you recommend a hobby for rainy days?",
    "Thank you for your help. What else can you do?",
)
"""50 prompts in English."""
