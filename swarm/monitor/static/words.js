/* How things are said: numbers, times and sentences. */

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const clock = new Intl.DateTimeFormat("en", { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const day = new Intl.DateTimeFormat("en", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

export const count = (number) => whole.format(number);
export const speed = (number) => fine.format(number);
export const short = (number) => compact.format(number);
export const time = (seconds) => clock.format(seconds * 1000);
export const date = (seconds) => day.format(seconds * 1000);
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
export const milliseconds = (ms) => (ms === undefined ? "" : `${fine.format(ms)} ms`);

const ONES = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"];
export const inWords = (number) => ONES[number] ?? count(number);
export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

export const STATES = {
  online: "online",
  joining: "joining",
  draining: "leaving",
  lost: "silent",
};

export function duration(seconds) {
  if (seconds < 90) return plural(Math.max(1, Math.round(seconds)), "second");
  if (seconds < 5400) return plural(Math.round(seconds / 60), "minute");
  if (seconds < 172800) return plural(Math.round(seconds / 3600), "hour");
  return plural(Math.round(seconds / 86400), "day");
}

export function brief(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

export function blocks(ranges) {
  const single = ranges.length === 1 && Number(ranges[0].split(":")[1]) - Number(ranges[0].split(":")[0]) === 1;
  const shown = ranges.slice(0, 4).join(", ");
  const more = ranges.length > 4 ? ` and ${plural(ranges.length - 4, "more range")}` : "";
  return `${single ? "block" : "blocks"} ${shown}${more}`;
}

export const online = (model) =>
  Object.values(model.servers).reduce((sum, server) => sum + (server.state === "online"), 0);

/* Two sentences about a model: what its state means, and what it gives. */
export function lede(model) {
  const servers = online(model);
  const least = Math.min(...model.replicas);
  let means;
  if (!servers) means = "No server takes requests for any of its blocks.";
  else if (model.health === "broken") means = `Nobody serves ${blocks(model.missing)}, so no text gets through.`;
  else if (model.health === "degraded")
    means = `${capital(blocks(model.single))} ${model.single.length > 1 || !blocks(model.single).startsWith("block ") ? "hang" : "hangs"} on a single server: if that one goes, the model stops.`;
  else means = `Every block is held by ${inWords(least)} servers or more, so any one of them may leave.`;
  return means;
}

/* One event: [at, kind, peer, name, first, beyond]. */
export function happened(kind, first, beyond) {
  const span = `${first}:${beyond}`;
  return {
    joined: `joined with ${span}`,
    back: `is back with ${span}`,
    moved: `moved to ${span}`,
    left: `left ${span} politely`,
    lost: `fell silent; it held ${span}`,
  }[kind];
}

export const shortPeer = (peer) => peer.slice(-8);
