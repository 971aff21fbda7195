// Times in an answer's words, as openkeye/inputs/intervals.py reads them: clock times, seconds, and spans of either.

const NUMBER = String.raw`(?:\d+:)?\d+:\d+(?:\.\d+)?|\d+(?:\.\d+)?`;
const UNIT = String.raw`\s*(?:seconds?|secs?|s)\b`;
const SPAN = String.raw`(?<from>${NUMBER})(?:${UNIT})?\s*(?:to|-|–|until|and|through)\s*(?<to>${NUMBER})`;
const CANDIDATES = new RegExp(
  String.raw`(?<lead>\b(?:from|between)\s+)?${SPAN}(?<unit>${UNIT})?` +
  String.raw`|\bat\s+(?<moment>${NUMBER})|(?<clock>(?:\d+:)?\d+:\d+(?:\.\d+)?)|(?<plain>\d+(?:\.\d+)?)(?=${UNIT})`,
  "dgi",
);

/** `12.5`, `1:05` or `1:00:05` as seconds. */
export function secondsOf(text) {
  return text.split(":").reduce((total, part) => total * 60 + Number(part), 0);
}

/** Pieces {text, seconds} that together are the text; seconds is null where a piece names no time. */
export function splitTimes(text) {
  const pieces = [];
  let end = 0;
  for (const match of text.matchAll(CANDIDATES)) {
    const { lead, unit, from } = match.groups;
    // Two numbers with a word between them are a span of time only where something says so.
    if (from !== undefined && !lead && !unit && !match[0].includes(":")) continue;
    for (const name of ["from", "to", "moment", "clock", "plain"]) {
      const place = match.indices.groups[name];
      if (place === undefined) continue;
      if (place[0] > end) pieces.push({ text: text.slice(end, place[0]), seconds: null });
      pieces.push({ text: text.slice(...place), seconds: secondsOf(text.slice(...place)) });
      end = place[1];
    }
  }
  if (end < text.length) pieces.push({ text: text.slice(end), seconds: null });
  return pieces;
}
