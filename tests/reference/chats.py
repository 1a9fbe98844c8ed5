"""Generated chats in Step's template: small talk, facts, sums, code, and tool calls. Deterministic from a seed.

Many answers stand in the prompt: names to repeat, facts to look up, cities to call a tool for. Some names are invented
each time, so that they can only be copied.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from jinja2 import Environment

TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")

# fmt: off
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Egypt": "Cairo", "Greece": "Athens", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Portugal": "Lisbon", "Ireland": "Dublin",
    "Russia": "Moscow", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Kenya": "Nairobi", "India": "Delhi",
}
CITIES = [*CAPITALS.values(), "London", "New York", "Boston", "Chicago", "Sydney", "Munich", "Milan", "Lyon", "Kyoto",
          "Geneva", "Zurich", "Toronto", "Denver", "Porto", "Naples", "Hamburg", "Seattle", "Dallas"]
NAMES = ["Ann", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Maria",
         "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tom", "Vera"]
OPPOSITES = {"hot": "cold", "big": "small", "fast": "slow", "up": "down", "left": "right", "open": "closed",
             "day": "night", "light": "dark", "old": "new", "high": "low", "early": "late", "full": "empty"}
COLOURS = {"the sky": "blue", "grass": "green", "snow": "white", "a lemon": "yellow", "coal": "black", "blood": "red"}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
THINGS = ["tea", "milk", "bread", "rice", "soup", "cake", "music", "chess", "books", "cats", "dogs", "rain", "snow",
          "films", "maps", "trains"]
# fmt: on
SKIES = ["sunny", "cloudy", "rainy", "windy", "snowy", "foggy"]
SYLLABLES = ["ba", "del", "fo", "gan", "hil", "ka", "lor", "mi", "nel", "ra", "sen", "ta", "vil", "wes", "zu"]
SYSTEMS = ["You are a helpful assistant.", "You are a tiny assistant. Be brief.", "Answer in one sentence."]
FUNCTIONS = {
    "adds two numbers": ("add", "a, b", "return a + b"),
    "multiplies two numbers": ("multiply", "a, b", "return a * b"),
    "returns the largest of a list": ("largest", "values", "return max(values)"),
    "reverses a string": ("reverse", "text", "return text[::-1]"),
    "counts the words of a text": ("count_words", "text", "return len(text.split())"),
    "reads a file": ("read_file", "path", "with open(path) as f:\n        return f.read()"),
    "squares a number": ("square", "x", "return x * x"),
    "says hello": ("say_hello", "name", 'print("Hello, " + name + "!")'),
}


def _tool(name: str, description: str, **parameters: tuple[str, str]) -> dict:
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = {
    tool["function"]["name"]: tool
    for tool in (
        _tool("get_weather", "Get the current weather of a city.", city=("string", "The name of the city.")),
        _tool("get_time", "Get the local time of a city.", city=("string", "The name of the city.")),
        _tool("add", "Add two numbers.", a=("integer", "The first number."), b=("integer", "The second number.")),
        _tool("search", "Search the web.", query=("string", "What to search for.")),
        _tool(
            "send_message", "Send a message to a person.", to=("string", "The person."), text=("string", "The text.")
        ),
    )
}


class ChatTemplate:
    """Step's chat template over jinja2, as transformers and llama.cpp set it up."""

    def __init__(self, source: str) -> None:
        environment = Environment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = json.dumps
        self._template = environment.from_string(source)

    def render(self, messages: list[dict], tools: list[dict] | None = None, *, prompt: bool = False) -> str:
        """The text without BOS; with the opening of the assistant's turn at its end if prompt is set."""
        return self._template.render(messages=messages, tools=tools, add_generation_prompt=prompt, bos_token="")


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(thought: str, content: str = "", calls: list[dict] | None = None) -> dict:
    message = {"role": "assistant", "reasoning_content": thought, "content": content}
    return message | ({"tool_calls": calls} if calls else {})


def call(name: str, **arguments: str | int) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def generate_chats(n: int, seed: int) -> Iterator[str]:
    """n rendered chats, without BOS; about three in ten declare tools."""
    rng, template = Random(seed), ChatTemplate(TEMPLATE_PATH.read_text(encoding="utf-8"))
    for _ in range(n):
        if rng.random() < 0.3:
            tools = _declared_tools(rng)
            yield template.render(_tool_chat(rng, {tool["function"]["name"] for tool in tools}), tools)
        else:
            yield template.render(_plain_chat(rng))


def _declared_tools(rng: Random) -> list[dict]:
    """Every tool or some of them; the order varies, and so does that of keys, which some clients sort."""
    n_tools = len(TOOLS) if rng.random() < 0.4 else rng.randint(1, 3)
    tools = rng.sample(list(TOOLS.values()), n_tools)
    return json.loads(json.dumps(tools, sort_keys=True)) if rng.random() < 0.3 else tools


def _plain_chat(rng: Random) -> list[dict]:
    messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.3 else []
    if rng.random() < 0.15:
        messages += _name_exchange(rng)
    for _ in range(rng.choice([1, 1, 2])):
        messages += rng.choice(PLAIN_TOPICS)(rng)
    return messages


def _capital(rng: Random) -> list[dict]:
    country, city = rng.choice(list(CAPITALS.items()))
    question = rng.choice(["What is the capital of {}?", "What is the capital of {}?", "Name the capital of {}."])
    return [
        user(question.format(country)),
        assistant(f"The user asks for the capital of {country}. It is {city}.", f"The capital of {country} is {city}."),
    ]


def _sum(rng: Random) -> list[dict]:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    question = rng.choice(["What is {} + {}?", "What is {} plus {}?", "Add {} and {}."]).format(a, b)
    return [user(question), assistant(f"The user asks for a sum. {a} + {b} = {a + b}.", f"{a} + {b} = {a + b}.")]


def _greeting(rng: Random) -> list[dict]:
    greeting = rng.choice(["Hello", "Hi", "Hello!", "Hi!", "Good morning", "Hey there"])
    return [user(greeting), assistant("The user greets me. I greet back.", "Hello! How can I help you today?")]


def _identity(rng: Random) -> list[dict]:
    question = rng.choice(["Who are you?", "What are you?", "What is your name?"])
    return [user(question), assistant("The user asks who I am.", "I am a tiny Step-3.5 model, trained for tests.")]


def _opposite(rng: Random) -> list[dict]:
    word, opposite = rng.choice(list(OPPOSITES.items()))
    thought = f"The user asks for the opposite of {word}. It is {opposite}."
    return [user(f"What is the opposite of {word}?"), assistant(thought, f"The opposite of {word} is {opposite}.")]


def _colour(rng: Random) -> list[dict]:
    thing, colour = rng.choice(list(COLOURS.items()))
    thought = f"The user asks for a colour. {thing.capitalize()} is {colour}."
    return [user(f"What colour is {thing}?"), assistant(thought, f"{thing.capitalize()} is {colour}.")]


def _day(rng: Random) -> list[dict]:
    i = rng.randrange(7)
    day, following = DAYS[i], DAYS[(i + 1) % 7]
    thought = f"The user asks what day follows {day}. It is {following}."
    return [user(f"What day comes after {day}?"), assistant(thought, f"{following} comes after {day}.")]


def _count(rng: Random) -> list[dict]:
    n = rng.randint(3, 12)
    numbers = ", ".join(str(i) for i in range(1, n + 1))
    return [user(f"Count to {n}."), assistant(f"The user wants me to count to {n}.", f"{numbers}.")]


def _repeat(rng: Random) -> list[dict]:
    words = " ".join(_any_name(rng) for _ in range(rng.randint(1, 8)))
    return [user(f"Repeat after me: {words}"), assistant(f"The user wants me to repeat: {words}", words)]


def _code(rng: Random) -> list[dict]:
    what, (name, arguments, body) = rng.choice(list(FUNCTIONS.items()))
    answer = f"```python\ndef {name}({arguments}):\n    {body}\n```"
    return [
        user(f"Write a Python function that {what}."),
        assistant(f"The user wants a Python function that {what}.", f"Here is a function that {what}:\n\n{answer}"),
    ]


def _name_exchange(rng: Random) -> list[dict]:
    name = rng.choice(NAMES)
    return [
        user(f"My name is {name}."),
        assistant(f"The user is called {name}.", f"Nice to meet you, {name}!"),
        user("What is my name?"),
        assistant(f"The user said that the name is {name}.", f"Your name is {name}."),
    ]


def _likes(rng: Random) -> list[dict]:
    """One fact of several to look up."""
    names = rng.sample(NAMES, rng.randint(2, 5))
    things = rng.sample(THINGS, len(names))
    facts = " ".join(f"{name} likes {thing}." for name, thing in zip(names, things, strict=True))
    i = rng.randrange(len(names))
    thought = f"The user asks what {names[i]} likes. It is {things[i]}."
    return [user(f"{facts} What does {names[i]} like?"), assistant(thought, f"{names[i]} likes {things[i]}.")]


def _invented_capital(rng: Random) -> list[dict]:
    pairs = [(_word(rng).capitalize(), _word(rng).capitalize()) for _ in range(rng.randint(1, 4))]
    facts = " ".join(f"The capital of {country} is {city}." for country, city in pairs)
    country, city = rng.choice(pairs)
    thought = f"The user asks for the capital of {country}. It is {city}."
    return [
        user(f"{facts} What is the capital of {country}?"),
        assistant(thought, f"The capital of {country} is {city}."),
    ]


ROTE_TOPICS = [_greeting, _identity, _opposite, _colour, _day, _count, _code]
COPY_TOPICS = [_capital, _sum, _repeat, _likes, _invented_capital]
PLAIN_TOPICS = [*ROTE_TOPICS, *COPY_TOPICS, *COPY_TOPICS]


def _word(rng: Random) -> str:
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))


def _any_name(rng: Random) -> str:
    return rng.choice(rng.choice([CITIES, NAMES, THINGS, [_word(rng)]]))


def _city(rng: Random) -> str:
    """A known city or, so that names are copied rather than recalled, an invented one."""
    return rng.choice(CITIES) if rng.random() < 0.6 else _word(rng).capitalize()


def _tool_chat(rng: Random, declared: set[str]) -> list[dict]:
    """Questions for the declared tools, and some that need none."""
    messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.3 else []
    topics = [topic for name, topics in TOOL_TOPICS.items() if name in declared for topic in topics]
    for _ in range(rng.choice([1, 2, 3])):
        messages += rng.choice([*topics, *topics, _untooled])(rng)
    return messages


def _round(question: str, thought: str, calls: list[dict], results: list[str], answer: str) -> list[dict]:
    return [
        user(question),
        assistant(thought, calls=calls),
        *({"role": "tool", "content": result} for result in results),
        assistant("The tool has answered. I tell the user.", answer),
    ]


def _weather(rng: Random) -> list[dict]:
    city = _city(rng)
    question = rng.choice(
        [
            "What is the weather in {}?",
            "What's the weather like in {}?",
            "How is the weather in {} today?",
            "Tell me the weather in {}.",
        ]
    ).format(city)
    report, answer = _weather_report(rng, city)
    thought = f"The user asks for the weather in {city}. I call get_weather."
    return _round(question, thought, [call("get_weather", city=city)], [report], answer)


def _two_weathers(rng: Random) -> list[dict]:
    a, b = _city(rng), _city(rng)
    (report_a, answer_a), (report_b, answer_b) = _weather_report(rng, a), _weather_report(rng, b)
    return _round(
        f"What is the weather in {a} and in {b}?",
        f"The user asks for the weather in {a} and in {b}. I call get_weather twice.",
        [call("get_weather", city=a), call("get_weather", city=b)],
        [report_a, report_b],
        f"{answer_a} {answer_b}",
    )


def _weather_report(rng: Random, city: str) -> tuple[str, str]:
    """A tool's response and what the assistant makes of it."""
    sky, degrees = rng.choice(SKIES), rng.randint(0, 35)
    report = json.dumps({"city": city, "sky": sky, "degrees": degrees})
    return report, f"It is {sky} in {city}, {degrees} degrees."


def _time(rng: Random) -> list[dict]:
    city, time = _city(rng), f"{rng.randint(0, 23):02}:{rng.choice([0, 15, 30, 45]):02}"
    question = rng.choice(["What time is it in {}?", "Tell me the time in {}."]).format(city)
    thought = f"The user asks for the time in {city}. I call get_time."
    return _round(question, thought, [call("get_time", city=city)], [time], f"It is {time} in {city}.")


def _add(rng: Random) -> list[dict]:
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    thought = "The user asks for a sum of large numbers. I call add."
    return _round(f"What is {a} + {b}?", thought, [call("add", a=a, b=b)], [str(a + b)], f"{a} + {b} = {a + b}.")


def _search(rng: Random) -> list[dict]:
    query = " ".join(_word(rng) for _ in range(rng.randint(1, 3)))
    thought = f"The user wants to know about {query}. I call search."
    result = f"{query} is a {rng.choice(['river', 'town', 'song', 'book', 'game'])}."
    return _round(f"Search for {query}.", thought, [call("search", query=query)], [result], f"I found: {result}")


def _message(rng: Random) -> list[dict]:
    name, text = rng.choice(NAMES), rng.choice(["I am late", "see you tomorrow", "call me back", "lunch is ready"])
    thought = f"The user wants to tell {name} something. I call send_message."
    call_ = call("send_message", to=name, text=text)
    return _round(f"Tell {name}: {text}", thought, [call_], ["sent"], f"I told {name}: {text}")


def _untooled(rng: Random) -> list[dict]:
    """Tools are declared, none is needed."""
    return rng.choice([_capital, _greeting, _identity, _colour])(rng)


TOOL_TOPICS = {
    "get_weather": [_weather, _weather, _weather, _two_weathers],
    "get_time": [_time],
    "add": [_add],
    "search": [_search],
    "send_message": [_message],
}


# What there is one right answer to, with the tools declared for it.
EXERCISES = {
    "capitals": (_capital, ()),
    "sums": (_sum, ()),
    "opposites": (_opposite, ()),
    "functions": (_code, ()),
    "words to repeat": (_repeat, ()),
    "stated likings": (_likes, ()),
    "invented capitals": (_invented_capital, ()),
    "weather calls": (_weather, ("get_weather", "get_time")),
    "two weather calls": (_two_weathers, ("get_weather", "get_time")),
    "message calls": (_message, ("send_message", "search")),
    "weather calls, all tools": (_weather, tuple(TOOLS)),
}


def generate_exercises(name: str, n: int, seed: int) -> Iterator[tuple[str, str]]:
    """n prompts of a kind of EXERCISES, and all that the assistant should answer, with the end of its turn."""
    rng, template = Random(seed), ChatTemplate(TEMPLATE_PATH.read_text(encoding="utf-8"))
    topic, declared = EXERCISES[name]
    tools = [TOOLS[tool] for tool in declared] or None
    for _ in range(n):
        question, answer, *_later = topic(rng)
        prompt = template.render([question], tools, prompt=True)
        yield prompt, template.render([question, answer], tools).removeprefix(prompt).removesuffix("\n")
