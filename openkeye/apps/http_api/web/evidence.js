// The evidence under the player: how much attention each moment of the video got, how often it was picked, and what it shows.

import { drawThumbnails } from "/web/thumbnails.js";

const NUM_STRIP = 12;
const NUM_PEAKS = 4;
const LEAST_PEAK = 1.5; // times the mean moment's attention
const ABOVE = 62; // of 100: where the axis between the two kinds of bars lies

const byId = (id) => document.getElementById(id);
const percent = (part) => `${(100 * part).toFixed(part < 0.0995 ? 1 : 0)}%`;

/** `5.7 s`, from a minute on `1:05`. */
export function clock(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const shown = parts[0] ? parts : parts.slice(1);
  return shown.map((part, place) => (place ? String(part).padStart(2, "0") : part)).join(":");
}

/**
 * Numbers of the strongest moments, strongest first: at least LEAST_PEAK times the mean, but for the first, and no two of them
 * within a twentieth of the whole of each other.
 */
export function strongest(moments, count) {
  const apart = (moments.at(-1).end_seconds - moments[0].start_seconds) / 20;
  const order = moments.map((_, number) => number).sort((a, b) => moments[b].weight - moments[a].weight || a - b);
  const least = (LEAST_PEAK * moments.reduce((sum, moment) => sum + moment.weight, 0)) / moments.length;
  const found = [];
  for (const number of order) {
    const isNew = found.every((other) => Math.abs(moments[other].seconds - moments[number].seconds) > apart);
    const isStrong = !found.length || moments[number].weight >= least;
    if (found.length < count && isNew && isStrong) found.push(number);
  }
  return found;
}

/** Number of the moment that a time falls into. */
export function momentAt(moments, seconds) {
  const number = moments.findIndex((moment) => seconds < moment.end_seconds);
  return number < 0 ? moments.length - 1 : number;
}

export class EvidenceTimeline {
  /** player: the video element; jumpTo(seconds): what a chosen moment does. */
  constructor(player, jumpTo) {
    this.player = player;
    this.jumpTo = jumpTo;
    this.moments = [];
    this.current = 0;
    this.round = 0; // of shows: pictures for an earlier one are not drawn any more
    const track = byId("track");
    track.addEventListener("keydown", (event) => this.#key(event));
    track.addEventListener("pointermove", (event) => this.#point(this.#momentUnder(event)));
    track.addEventListener("click", (event) => this.#choose(this.#momentUnder(event)));
    player.addEventListener("timeupdate", () => this.#movePlayhead());
  }

  hide() {
    this.round += 1;
    this.moments = [];
    byId("evidence").hidden = true;
  }

  /** evidence: of one video, as the API tells it; spans: [[from, to]] of the answer, seconds; url: of the video. */
  show(evidence, spans, url) {
    this.hide();
    if (!evidence.moments.length) return;
    this.moments = evidence.moments;
    this.start = this.moments[0].start_seconds;
    this.seconds = this.moments.at(-1).end_seconds - this.start || 1;
    this.isSelective = evidence.is_selective;
    this.peaks = strongest(this.moments, NUM_PEAKS);
    byId("evidence").hidden = false;
    byId("picked-key").hidden = !evidence.is_selective;
    byId("span-key").hidden = !spans.length;
    byId("evidence-note").textContent = this.#note(evidence);
    byId("axis-start").textContent = clock(this.start);
    byId("axis-end").textContent = clock(this.start + this.seconds);
    this.#drawBars(spans);
    this.#listPeaks();
    byId("track").setAttribute("aria-valuemin", "1");
    byId("track").setAttribute("aria-valuemax", String(this.moments.length));
    this.#point(this.peaks[0]);
    this.#movePlayhead();
    if (url) this.#drawPictures(url);
  }

  #note(evidence) {
    const looked = `${percent(evidence.weight)} of the attention behind this answer fell on the video.`;
    if (!evidence.is_selective) return `${looked} The prompt is short: every part of it was attended to.`;
    return `${looked} Sparse attention picked ${percent(evidence.share)} of the video's tokens; the lower bars show from where.`;
  }

  #drawBars(spans) {
    const svg = byId("bars");
    svg.setAttribute("viewBox", `0 0 ${this.seconds} 100`);
    svg.replaceChildren();
    const add = (kind, from, to, y, height) => {
      const rect = document.createElementNS(svg.namespaceURI, "rect");
      const box = { x: from - this.start, y, width: Math.max(0, to - from), height, class: kind };
      for (const [name, value] of Object.entries(box)) rect.setAttribute(name, value);
      svg.append(rect);
    };
    for (const [from, to] of spans) add("span", Math.max(from, this.start), Math.min(to, this.start + this.seconds), 0, 100);
    const above = this.isSelective ? ABOVE : 94;
    const most = (name) => Math.max(...this.moments.map((moment) => moment[name])) || 1;
    const [heaviest, oftenest] = [most("weight"), most("share")];
    const strong = new Set(this.peaks);
    this.moments.forEach((moment, number) => {
      const gap = (moment.end_seconds - moment.start_seconds) * 0.1;
      const [from, to] = [moment.start_seconds + gap, moment.end_seconds - gap];
      const height = (above - 6) * (moment.weight / heaviest);
      add(`bar attention${strong.has(number) ? " strong" : ""}`, from, to, above - height, height);
      if (this.isSelective) add("bar picked", from, to, ABOVE + 1.5, (100 - ABOVE - 6) * (moment.share / oftenest));
    });
  }

  #listPeaks() {
    const inTime = this.peaks.toSorted((a, b) => a - b);
    this.peakCanvases = inTime.map((number) => ({ canvas: document.createElement("canvas"), seconds: this.moments[number].seconds }));
    const items = inTime.map((number, place) => {
      const moment = this.moments[number];
      const [time, much] = [document.createElement("span"), document.createElement("span")];
      time.textContent = clock(moment.seconds);
      much.textContent = `${percent(moment.weight)} attention`;
      much.className = "much";
      const button = document.createElement("button");
      button.type = "button";
      button.append(this.peakCanvases[place].canvas, time, much);
      button.addEventListener("click", () => this.#choose(number));
      const item = document.createElement("li");
      item.append(button);
      return item;
    });
    byId("peaks").replaceChildren(...items);
  }

  async #drawPictures(url) {
    const round = this.round;
    const middles = Array.from({ length: NUM_STRIP }, (_, place) => this.start + ((place + 0.5) / NUM_STRIP) * this.seconds);
    const strip = middles.map((seconds) => ({ canvas: document.createElement("canvas"), seconds }));
    byId("strip").replaceChildren(...strip.map(({ canvas }) => canvas));
    // Wide enough for a card of the list on a phone, twice the height of the strip.
    const isDrawn = await drawThumbnails(url, [...this.peakCanvases, ...strip], 108, () => round !== this.round);
    if (round !== this.round) return;
    byId("strip").dataset.state = isDrawn ? "drawn" : "empty";
    if (isDrawn) return;
    byId("strip").replaceChildren();
    for (const { canvas } of this.peakCanvases) canvas.remove();
  }

  #momentUnder(event) {
    const box = byId("track").getBoundingClientRect();
    return momentAt(this.moments, this.start + ((event.clientX - box.left) / box.width) * this.seconds);
  }

  /** Move the cursor to a moment. */
  #point(number) {
    this.current = number;
    const moment = this.moments[number];
    const told = [`${percent(moment.weight)} of attention`, ...(this.isSelective ? [`picked ${percent(moment.share)}`] : [])];
    byId("moment").textContent = [clock(moment.seconds), ...told].join(" · ");
    byId("track").setAttribute("aria-valuenow", String(number + 1));
    byId("track").setAttribute("aria-valuetext", [clock(moment.seconds), ...told].join(", "));
    byId("cursor").style.left = this.#place(moment.start_seconds);
    byId("cursor").style.width = `${(100 * (moment.end_seconds - moment.start_seconds)) / this.seconds}%`;
  }

  #choose(number) {
    this.#point(number);
    this.jumpTo(this.moments[number].seconds);
  }

  #key(event) {
    const last = this.moments.length - 1;
    const leap = Math.max(1, Math.round(last / 10));
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: leap, PageDown: -leap, Home: -last, End: last };
    if (event.key === "Enter" || event.key === " ") this.#choose(this.current);
    else if (event.key in steps) this.#point(Math.min(last, Math.max(0, this.current + steps[event.key])));
    else return;
    event.preventDefault();
  }

  #place(seconds) {
    return `${100 * Math.min(1, Math.max(0, (seconds - this.start) / this.seconds))}%`;
  }

  #movePlayhead() {
    if (this.moments.length) byId("playhead").style.left = this.#place(this.player.currentTime);
  }
}
