// Which words of two texts differ. Pure functions.

const MOST_CELLS = 4e6; // of the table below; beyond it a frame would take too long

/** Words, each with the space before it: joined again they are the text. */
export function splitWords(text) {
  return text.match(/\s*\S+|\s+$/g) ?? [];
}

/** For each word of two lists whether it has no counterpart in the other: `[changedInA, changedInB]`. */
export function changedWords(a, b) {
  const one = a.map((word) => word.trim());
  const other = b.map((word) => word.trim());
  let start = 0;
  while (start < one.length && start < other.length && one[start] === other[start]) start++;
  let [endOne, endOther] = [one.length, other.length];
  while (endOne > start && endOther > start && one[endOne - 1] === other[endOther - 1]) [endOne, endOther] = [endOne - 1, endOther - 1];
  const changed = [one.map((_, i) => i >= start && i < endOne), other.map((_, i) => i >= start && i < endOther)];
  keepCommon(one.slice(start, endOne), other.slice(start, endOther), start, changed);
  return changed;
}

/** Clear the marks of a longest common subsequence of the middles. */
function keepCommon(one, other, start, [changedOne, changedOther]) {
  const [rows, columns] = [one.length, other.length];
  if (rows * columns > MOST_CELLS) return;
  const width = columns + 1;
  const longest = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i--) {
    for (let j = columns - 1; j >= 0; j--) {
      const after = longest[(i + 1) * width + j + 1] + 1;
      longest[i * width + j] =
        one[i] === other[j] ? after : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  for (let i = 0, j = 0; i < rows && j < columns; ) {
    if (one[i] === other[j]) {
      changedOne[start + i++] = false;
      changedOther[start + j++] = false;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
}

/** Stretches of words that are marked alike, without a mark on the space before a word: `[{text, changed}]`. */
export function runs(words, changed) {
  const found = [];
  const put = (text, mark) => {
    const last = found.at(-1);
    if (last && last.changed === mark) last.text += text;
    else if (text) found.push({ text, changed: mark });
  };
  words.forEach((word, i) => {
    const space = word.slice(0, word.length - word.trimStart().length);
    put(space, changed[i] && Boolean(found.at(-1)?.changed));
    put(word.slice(space.length), changed[i]);
  });
  return found;
}

/** What a text that is written anew leaves standing of the one before it. */
export function remainder(text, before) {
  return splitWords(before).slice(splitWords(text).length).join("");
}
