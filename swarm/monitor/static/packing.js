/* Spans of blocks in lanes, so that none overlaps: who has a lane keeps it while others come. */

export class Lanes {
  constructor() {
    this.lanes = []; // of [first, beyond, peer]
    this.places = new Map(); // peer: [lane, first, beyond]
  }

  get count() {
    return this.lanes.length;
  }

  /* Whether anything changed: `first` to `beyond` belong to `peer` now. */
  put(peer, first, beyond) {
    const place = this.places.get(peer);
    if (place && place[1] === first && place[2] === beyond) return false;
    this.remove(peer);
    let lane = this.lanes.findIndex((taken) => taken.every(([a, b]) => beyond <= a || b <= first));
    if (lane < 0) lane = this.lanes.push([]) - 1;
    this.lanes[lane].push([first, beyond, peer]);
    this.places.set(peer, [lane, first, beyond]);
    return true;
  }

  remove(peer) {
    const place = this.places.get(peer);
    if (!place) return false;
    this.lanes[place[0]] = this.lanes[place[0]].filter((taken) => taken[2] !== peer);
    this.places.delete(peer);
    while (this.lanes.length && !this.lanes.at(-1).length) this.lanes.pop();
    return true;
  }

  /* Peers as one reads: lane by lane, from the first block on. */
  order() {
    return this.lanes.flatMap((lane) => [...lane].sort((a, b) => a[0] - b[0]).map((taken) => taken[2]));
  }
}
