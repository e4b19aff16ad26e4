"""What make_goldens.py asks SmolLM2: four chats and a paragraph, written for this test."""

_STORY = """\
The lighthouse at the end of the long stone pier had been dark for eleven years when Marta came \
back to the village. Her grandfather had kept it, and his father before him, and there were \
people who still called the house beside it by the family's name. She had expected the door to \
be locked, but the key lay where it had always lain, under the third flowerpot, and it turned \
without a sound.

Inside, everything was as he had left it. A blue cup stood upside down on the shelf. The logbook \
was open at the last page, and the last line said only that the wind had turned to the \
north-west and that the sea was rising. On the wall hung the big clock, which had stopped at \
twenty past four, and under it the barometer, which had not.

She climbed the stairs slowly, one hand on the rail, counting them as she had done as a child. \
There were one hundred and twelve. At the top the great lens was covered with a grey cloth, and \
when she pulled it away the dust rose and hung in the evening light like smoke. The lamp itself \
was gone. Somebody had taken it, or sold it, or carried it down to the museum in the town, where \
it now stood behind glass with a small white card that gave the wrong year.

Marta sat down on the iron step and looked at the water. Far out, a fishing boat was coming home \
against the wind, and she found that she was waiting, as he must have waited every night, for it \
to pass the rocks."""

CHATS = [
    [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}],
    [
        {"role": "user", "content": "Name three fruits that are red."},
        {"role": "assistant", "content": "Apples, cherries and strawberries."},
        {"role": "user", "content": "Now name three that are yellow."},
    ],
    [
        {"role": "system", "content": "You are a patient teacher who explains with examples."},
        {"role": "user", "content": "Why does ice float on water?"},
    ],
    [{"role": "user", "content": f"{_STORY}\n\nHow many stairs did Marta count?"}],
]
"""One turn, several turns, a system message, and a prompt of more than 300 tokens."""

PARAGRAPH = """\
Bread begins with patience. The baker mixes flour, water and salt, adds a little of yesterday's \
dough, and then does almost nothing for a whole night. While the town sleeps, the dough rises \
slowly in the cold, and small bubbles gather under its skin. In the morning it is folded, shaped \
and left to rest once more before it meets the heat of the oven and turns brown."""
"""Its first 64 tokens are scored."""
