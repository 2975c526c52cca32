"""Everyday questions with a short answer each: sample data for a first run on text.

Some answers are kinder than others, so that a reward for kindness has something to find.
"""

_TRAIN = """\
How do I boil an egg? | Put it in hot water for eight minutes.
What should I cook tonight? | A warm soup would be nice. Enjoy it!
How long does rice take? | About fifteen minutes on a low heat.
Is this bread still good? | If it smells good, you can eat it.
How do I make tea? | Pour hot water on the leaves and wait.
Can you help me with dinner? | Of course, gladly. What do you like to eat?
My cake did not rise. | I am sorry to hear that. Try more baking powder.
How do I cut an onion? | Cut it in half and then in slices.
When do I water the plants? | Water them in the morning, twice a week.
My roses look sick. | Cut off the brown leaves and wait.
What grows in the shade? | Ferns grow well in the shade.
How do I plant a tree? | Dig a wide hole and water it well.
When do tomatoes ripen? | They ripen in late summer.
Can I grow herbs inside? | Yes, gladly put them near a window.
The soil is dry. | Water it slowly in the evening.
How do I get rid of snails? | Collect them in the evening.
How do I clean a window? | Use warm water and a dry cloth.
The door makes a noise. | Put a little oil on it.
How do I fix a chair? | Use glue and let it dry for a day.
My room is cold. | Close the window and put on a warm coat.
The lamp does not work. | Try another bulb, please.
How do I fold a shirt? | Lay it flat and fold the arms in.
How do I wash wool? | Wash it by hand in cold water.
There is a stain on my coat. | Use cold water and soap, please.
How do I write a letter? | Say what you mean in short words.
I have to give a talk. | You can do it! Take a deep breath and enjoy it.
How do I learn a language? | Read a little every day.
I forgot her birthday. | Call her and say that you are sorry.
How do I say thank you? | Say thank you, and say what for.
I cannot sleep. | I am sorry to hear that. A warm tea may help.
I feel alone today. | I am sorry to hear that. Call a friend, please.
I won a prize! | That is wonderful. Thank you for telling me!
I lost my keys. | Look in your coat and near the door.
What should I read? | A short story is a good start.
When does the train leave? | Look at the board near the door.
How far is the lake? | You can walk there in an hour.
Is it going to rain? | Take a coat, it may rain in the evening.
What do I need for a walk? | Take good shoes, water and a coat.
Where can I eat? | There is a nice place near the lake. Enjoy it!
How do I find the way? | Look at the map and walk slowly.
"""

_HELD_OUT = """\
How do I make soup? | Boil water and put in what you like.
My bread is dry. | I am sorry to hear that. Put it in warm soup.
How long does an egg take? | About eight minutes in hot water.
When do I plant roses? | Plant them in late summer.
My plants look dry. | Water them in the evening, please.
How do I clean a coat? | Use cold water and a dry cloth.
The window makes a noise. | Close it well and put a little oil on it.
My lamp is old. | Try another one.
How do I write a story? | Read a little every day and start in short words.
I feel sick today. | I am sorry to hear that. Drink warm tea and sleep.
Can you help me with a talk? | Of course, gladly. Say what you mean.
How do I find the lake? | Look at the map, it is near.
"""


def phrase_rows(split: str) -> list[dict[str, str]]:
    """Return the rows of a split: a prompt and its completion, both plain texts.

    Args:
        split: "train" (40 rows) or "validation" (12 rows).
    """
    text = {"train": _TRAIN, "validation": _HELD_OUT}[split]
    pairs = (line.split(" | ") for line in text.splitlines())
    return [{"prompt": question, "completion": answer} for question, answer in pairs]
