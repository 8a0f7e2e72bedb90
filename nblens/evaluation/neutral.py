"""Plain texts about nothing in particular: what steering should leave alone."""

__all__ = ["NEUTRAL_TEXTS"]

NEUTRAL_TEXTS = (
    "The harbour lies on the northern side of the bay. Two ferries a day connect it with the island, and a narrow "
    "road leads inland along the river to the old market town.",
    "To make the dough, mix the flour with a pinch of salt, add water a little at a time, and knead it for ten "
    "minutes. Cover the bowl with a cloth and leave it for an hour.",
    "The library opened in 1912 in a building that had been a post office. It holds about forty thousand books, "
    "most of them on the first floor, and a reading room with twelve tables.",
    "Granite is an igneous rock that forms when magma cools slowly below the surface. Its grains of quartz, "
    "feldspar and mica are large enough to be seen without a lens.",
    "The function takes a list of numbers and returns their mean. If the list is empty it raises an error, so "
    "callers should check its length before they pass it on.",
    "Trains to the airport leave from platform three every fifteen minutes. Tickets can be bought from the "
    "machines near the entrance or from the conductor on board.",
    "The committee met on the second Tuesday of the month. It reviewed the minutes of the last meeting, approved "
    "the budget for the new roof, and set a date for the annual assembly.",
    "Swifts spend most of their lives in the air. They return to the same nesting place each spring, raise two or "
    "three young, and leave for the south again before the end of summer.",
    "A triangle whose sides measure three, four and five units has a right angle between the two shorter sides, "
    "because the square of five equals the sum of the squares of three and four.",
    "The parcel was sent on Monday and reached the sorting centre on Wednesday morning. From there it was carried "
    "by van to the village, where the shop keeps letters for its customers.",
    "In the second half of the century the mill was converted to steam power. The chimney still stands beside the "
    "canal, and the ground floor is now used as a workshop.",
    "Check that the cable is connected to both devices and that the switch on the back is turned on. The green "
    "light should blink twice and then stay lit.",
)
"""Used for KL and perplexity where a session is given no texts of its own."""
